"""The MLflow model registry: a model logged to its training's run, with signature and example, and registered."""

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mlpipes.tracking.runs import Tracker

FINGERPRINT = "mlpipes.fingerprint"


def register(
    tracker: Tracker,
    run_id: str,
    registered_name: str,
    module: Any,
    example: np.ndarray,
    outputs: np.ndarray,
    tags: Mapping[str, str],
    extra_files: list[Path],
) -> str:
    """Log a torch module in the pt2 format, check that it comes back the same, register it; returns the version.

    A fingerprint is registered once: a model that is there already is found by its tag, so retries make no copies.
    Raises ValueError if the stored program computes something else than `outputs`.
    """
    found = tracker.client.search_model_versions(f"name='{registered_name}'")
    for model_version in found:
        if model_version.tags.get(FINGERPRINT) == tags[FINGERPRINT]:
            return str(model_version.version)
    # Progress bars of a file that lies on the same disk are noise; read when MLflow is imported.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.models import infer_signature

    for noisy in ("mlflow.utils.environment", "mlflow.models.model"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow.set_tracking_uri(tracker.uri)
    mlflow.set_registry_uri(tracker.uri)
    with mlflow.start_run(run_id=run_id):
        logged = mlflow.pytorch.log_model(
            module,
            name="model",
            input_example=example,
            signature=infer_signature(example, outputs),
            serialization_format="pt2",
            # Given rather than inferred: inference imports the model in a new process and may ask the network.
            pip_requirements=[f"{name}=={version(name)}" for name in ("torch", "numpy", "mlflow")],
            extra_files=[str(path) for path in extra_files],
        )
    again = np.asarray(mlflow.pyfunc.load_model(logged.model_uri).predict(example))
    if not np.allclose(again, outputs, rtol=1e-3, atol=1e-3):
        gap = float(np.abs(again - outputs).max())
        raise ValueError(f"the exported model's outputs differ from the trained model's by up to {gap}")
    with suppress(MlflowException):  # it exists: another scale was first
        tracker.client.create_registered_model(registered_name)
    registered = tracker.client.create_model_version(
        registered_name, logged.model_uri, run_id=run_id, tags=dict(tags), model_id=logged.model_id
    )
    return str(registered.version)
