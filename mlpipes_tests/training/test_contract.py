"""The contract of workloads fits what no workload of mlpipes needs: made-up clips with adapters (`clips.py`)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpipes.data.snapshot import open_snapshot
from mlpipes.store.outcome import Outcome
from mlpipes.training.checkpoints import Checkpoints
from mlpipes.training.model import evaluate, export_best, load_model
from mlpipes_tests.training.harness import curve, make_job, run, run_here

CLIPS = "mlpipes_tests.training.clips:clips"
SCALE = "w1-b16-e3-g0"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    job = make_job(tmp_path_factory.mktemp("clips"), SCALE, CLIPS)
    return job, run_here(job)


def test_only_the_adapter_is_kept_and_the_model_comes_back_whole(uninterrupted: Any) -> None:
    job, _ = uninterrupted
    outcome = Outcome.read(job.folder.result)
    kept = Checkpoints(job.folder.checkpoints).load(outcome.best.step).model_state()
    assert sorted(kept) == ["adapter.bias", "adapter.weight"]
    snapshot = open_snapshot(job.snapshot)
    model = load_model(export_best(job.folder, job.recipe, outcome), snapshot)
    report, scores = evaluate(model, snapshot, "validation")
    assert report.estimates["mean_squared_error"].value == pytest.approx(outcome.best.metrics["loss"], rel=1e-6)
    # What the report saw of the model's pictures is what was measured.
    assert report.quantities["worst"] == pytest.approx(-float(scores.min()), rel=1e-5)


def test_a_crash_and_another_number_of_workers_change_nothing(uninterrupted: Any, tmp_path: Path) -> None:
    _, expected = uninterrupted
    job = make_job(tmp_path, SCALE, CLIPS, every_steps=2)
    run(job, workers=2, crash=5)
    outcome = run(job, workers=2)
    assert outcome["resumed_from_step"] == 4
    assert outcome["weights_digest"] == expected["weights_digest"]
    assert curve(outcome) == curve(expected)


def test_micro_batches_bound_what_the_model_sees_in_evaluation_too(uninterrupted: Any, tmp_path: Path) -> None:
    _, whole = uninterrupted
    parts = run_here(make_job(tmp_path, SCALE, CLIPS, micro_batch=2))  # `predict` of the workload looks
    losses = [[value for name, value, _ in curve(o) if name == "validation/loss"] for o in (parts, whole)]
    assert np.allclose(*losses, rtol=1e-5)


def test_the_program_that_is_stored_answers_as_the_model(uninterrupted: Any, tmp_path: Path) -> None:
    import mlflow

    from mlpipes.training.model import deployable

    job, _ = uninterrupted
    snapshot = open_snapshot(job.snapshot)
    outcome = Outcome.read(job.folder.result)
    found = deployable(load_model(export_best(job.folder, job.recipe, outcome), snapshot), snapshot)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("clips", str(tmp_path / "artifacts")))
    with mlflow.start_run():
        logged = found.log([])  # compares by itself
    assert logged.signature.inputs.to_dict()[0]["tensor-spec"]["shape"] == (-1, 1, 3, 6, 6)
