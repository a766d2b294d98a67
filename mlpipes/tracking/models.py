"""The MLflow model registry: a model logged to its training's run, with signature and example, and registered."""

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlpipes.tracking.runs import Tracker

if TYPE_CHECKING:
    from mlpipes.workloads.base import Deployable

FINGERPRINT, SCALE, SNAPSHOT = "mlpipes.fingerprint", "mlpipes.scale", "mlpipes.snapshot"
"""Tags of a registered version."""


def registered_name(workload: str) -> str:
    """The name under which a workload's models are registered."""
    return f"mlpipes-{workload}"


def register(
    tracker: Tracker,
    run_id: str,
    registered_name: str,
    deployable: "Deployable",
    tags: Mapping[str, str],
    extra_files: list[Path],
) -> str:
    """Log a model, check that it comes back and computes the same, register it; returns the version.

    A fingerprint is registered once: a model that is there already is found by its tag, so retries make no copies.
    Raises ValueError if the stored model computes something else than the trained one.
    """
    found = tracker.client.search_model_versions(f"name='{registered_name}'")
    for model_version in found:
        if model_version.tags.get(FINGERPRINT) == tags[FINGERPRINT]:
            return str(model_version.version)
    # Progress bars of a file that lies on the same disk are noise; read when MLflow is imported.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow
    from mlflow.exceptions import MlflowException

    for noisy in ("mlflow.utils.environment", "mlflow.models.model"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow.set_tracking_uri(tracker.uri)
    mlflow.set_registry_uri(tracker.uri)
    log = _log_program if deployable.tokenizer is None else _log_text_model
    with mlflow.start_run(run_id=run_id):
        logged = log(deployable, [str(path) for path in extra_files])
    with suppress(MlflowException):  # it exists: another scale was first
        tracker.client.create_registered_model(registered_name)
    registered = tracker.client.create_model_version(
        registered_name, logged.model_uri, run_id=run_id, tags=dict(tags), model_id=logged.model_id
    )
    return str(registered.version)


def _requirements(*names: str) -> list[str]:
    # Given rather than inferred: inference imports the model in a new process and may ask the network.
    return [f"{name}=={version(name)}" for name in names]


def _log_program(deployable: "Deployable", extra_files: list[str]) -> Any:
    """A torch module in the pt2 format: raw samples (an array) in, outputs (an array) out."""
    import mlflow
    import torch
    from mlflow.models import infer_signature

    with torch.no_grad():
        outputs = deployable.module(torch.from_numpy(deployable.example)).float().numpy()
    logged = mlflow.pytorch.log_model(
        deployable.module,
        name="model",
        input_example=deployable.example,
        signature=infer_signature(deployable.example, outputs),
        serialization_format="pt2",
        pip_requirements=_requirements("torch", "numpy", "mlflow"),
        extra_files=extra_files,
    )
    again = np.asarray(mlflow.pyfunc.load_model(logged.model_uri).predict(deployable.example))
    _check(again, outputs)
    return logged


def _log_text_model(deployable: "Deployable", extra_files: list[str]) -> Any:
    """An encoder with its tokenizer (`text_model.py`): a table of texts in, a table of labels and probabilities out."""
    import mlflow
    import pandas as pd
    from mlflow.models import infer_signature

    from mlpipes.workloads import served_text_model

    model: Any = deployable.module
    example = pd.DataFrame(deployable.example)
    with tempfile.TemporaryDirectory(prefix="mlpipes-model-") as scratch:
        folder = Path(scratch) / "model"
        model.save_pretrained(folder)
        assert deployable.tokenizer is not None  # noqa: S101 - that is what makes it a text model
        shutil.copytree(deployable.tokenizer, folder, dirs_exist_ok=True)
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(served_text_model.__file__)),
            artifacts={"model": str(folder)} | {Path(path).stem: path for path in extra_files},
            input_example=example,
            signature=infer_signature(example, pd.DataFrame(deployable.outputs)),
            pip_requirements=_requirements("torch", "transformers", "pandas", "mlflow"),
        )
    again: Any = mlflow.pyfunc.load_model(logged.model_uri).predict(example)
    for name, column in deployable.outputs.items():
        if name == "label":
            if list(again[name]) != list(column):
                raise ValueError(f"the stored model says {list(again[name])}, the trained one {list(column)}")
        else:
            _check(again[name].to_numpy(), np.asarray(column))
    return logged


def _check(again: np.ndarray, outputs: np.ndarray) -> None:
    if not np.allclose(again, outputs, rtol=1e-3, atol=1e-3):
        gap = float(np.abs(again - outputs).max())
        raise ValueError(f"the stored model's outputs differ from the trained model's by up to {gap}")
