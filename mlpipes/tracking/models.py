"""The MLflow model registry: a model logged to its training's run, with signature and example, and registered."""

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mlpipes.tracking.runs import Tracker

if TYPE_CHECKING:
    from mlpipes.workloads.base import Deployable

FINGERPRINT, SCALE, SNAPSHOT = "mlpipes.fingerprint", "mlpipes.scale", "mlpipes.snapshot"
EXPORTED, WEIGHTS = "mlpipes.exported_digest", "mlpipes.weights_digest"
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
    extra_files: Sequence[Path],
    parameters: Mapping[str, float] | None = None,
) -> str:
    """Log a model with its `parameters`, check that it comes back and computes the same, register it; returns the version.

    What is exported of a training is registered once: a version with both digests is found by its tags, so retries make no
    copies; one that was exported otherwise, with another temperature say, is another version.
    Raises ValueError if the stored model computes something else than the trained one.
    """
    found = tracker.client.search_model_versions(f"name='{registered_name}'")
    for model_version in found:
        if all(model_version.tags.get(name) == tags[name] for name in (FINGERPRINT, EXPORTED)):
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
    # Somebody's own code in this process may have chosen another experiment, and a run of ours would then be refused.
    mlflow.set_experiment(experiment_id=tracker.client.get_run(run_id).info.experiment_id)
    with mlflow.start_run(run_id=run_id):
        logged = deployable.log(extra_files)
        if parameters:
            tracker.client.log_model_params(logged.model_id, {name: f"{value:g}" for name, value in parameters.items()})
    with suppress(MlflowException):  # it exists: another scale was first
        tracker.client.create_registered_model(registered_name)
    registered = tracker.client.create_model_version(
        registered_name, logged.model_uri, run_id=run_id, tags=dict(tags), model_id=logged.model_id
    )
    return str(registered.version)
