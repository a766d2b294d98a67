"""Registered models to serve, without a training: small networks with random weights; no test is in here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlpipes.tracking.models import EXPORTED, FINGERPRINT, SCALE, WEIGHTS, register
from mlpipes.tracking.runs import Tracker
from mlpipes.workloads.base import DataInfo
from mlpipes.workloads.image_classification import BuiltInHyperparameters, ImageClassification
from mlpipes.workloads.served import served_predictions
from mlpipes.workloads.tensors import on_device
from mlpipes_tests import prepared

NAME = "mlpipes-digits"
ROWS = 61
IMAGES = np.random.default_rng(0).integers(0, 17, (ROWS, 1, 8, 8), dtype=np.uint8)


def tracker_in(home: Path) -> Tracker:
    """MLflow's store in a home folder."""
    return Tracker(prepared.mlflow_store(home / "mlflow" / "mlflow.db"))


def run_in(tracker: Tracker, name: str, fingerprint: str) -> str:
    """A run of MLflow, as a training of a workload in the tracker's home has one; with a server, in that of now."""
    with pytest.MonkeyPatch.context() as patch:
        if tracker.uri.startswith("sqlite:///"):
            patch.setenv("MLPIPES_HOME", str(Path(tracker.uri.removeprefix("sqlite:///")).parents[1]))
        return tracker.run_of(name, fingerprint, f"run {fingerprint}", {}, {})


def registered(
    tracker: Tracker, seed: int, classes: int = 10, more: Mapping[str, str] | None = None
) -> tuple[str, np.ndarray]:
    """A registered version with `more` tags, and what the evaluation would say of `IMAGES`: logits (N, classes) float32."""
    task: Any = ImageClassification(None, None)  # type: ignore[arg-type]
    hp = BuiltInHyperparameters(network="digits")
    columns = {"image": IMAGES, "label": np.zeros(ROWS, dtype=np.int64)}
    info = DataInfo({"class_names": [str(n) for n in range(classes)], "pixel_maximum": 16}, task.statistics(columns))
    torch.manual_seed(seed)
    model = task.build_model(hp, info).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    evaluated = served_predictions(task, model, on_device(columns, torch.device("cpu")), hp, "fp32")["logits"]
    run = run_in(tracker, "digits", f"f{seed}")
    tags = {FINGERPRINT: f"f{seed}", EXPORTED: f"e{seed}", SCALE: "w1-b128-e1-g0", WEIGHTS: f"{seed:064x}"}
    tags |= more or {}
    return register(tracker, run, NAME, task.deployable(model, hp, info, columns), tags, []), evaluated


def champion(tracker: Tracker, version: str) -> None:
    """Make a version champion."""
    tracker.client.set_registered_model_alias(NAME, "champion", version)
