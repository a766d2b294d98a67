"""Odd workloads (`odd.py`) train right, or fail with one clear error; never wrong without a word."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlpipes.data.snapshot import open_snapshot
from mlpipes.errors import ConfigError, TrainingFailedError
from mlpipes.reporting.metric import Metric
from mlpipes.reporting.report import Estimate, Report
from mlpipes.store.outcome import Outcome
from mlpipes.training.checkpoints import Checkpoints
from mlpipes.training.loop import Trainer
from mlpipes.training.model import evaluate, export_best, load_model
from mlpipes.training.parallel import SingleWorker
from mlpipes.training.worker import explained
from mlpipes_tests.training.harness import make_job, run, run_here

SCALE = "w1-b12-e2-g0"


def odd(name: str) -> str:
    return f"mlpipes_tests.training.odd:{name}"


def test_random_numbers_of_numpy_and_python_depend_on_the_position_alone(tmp_path: Path) -> None:
    job = make_job(tmp_path / "a", SCALE, odd("other_random_numbers"), every_steps=3)
    run(job, workers=2, crash=5)
    interrupted = run(job, workers=2)
    assert interrupted["resumed_from_step"] == 3
    alone = run_here(make_job(tmp_path / "b", SCALE, odd("other_random_numbers")))
    assert interrupted["weights_digest"] == alone["weights_digest"]


def test_to_load_a_model_draws_no_random_numbers_of_others(tmp_path: Path) -> None:
    job = make_job(tmp_path, SCALE, odd("other_random_numbers"))
    run_here(job)
    folder = export_best(job.folder, job.recipe, Outcome.read(job.folder.result))
    np.random.seed(1)
    load_model(folder, open_snapshot(job.snapshot))
    drawn = np.random.rand()
    np.random.seed(1)
    assert drawn == np.random.rand()


def test_workers_that_built_different_models_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Another(SingleWorker):
        size = 2

        def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
            return [tensor, tensor + 1]

    monkeypatch.setattr(Trainer, "resume", lambda self: setattr(self, "workers", Another()))
    with pytest.raises(TrainingFailedError, match="have built different models from the same seed"):
        run_here(make_job(tmp_path, SCALE, odd("plain")))


def test_tied_weights_are_kept_and_come_back(tmp_path: Path) -> None:
    job = make_job(tmp_path, SCALE, odd("tied"))
    run_here(job)
    outcome = Outcome.read(job.folder.result)
    kept = Checkpoints(job.folder.checkpoints).load(outcome.best.step).model_state()
    assert torch.equal(kept["first.weight"], kept["second.weight"])
    snapshot = open_snapshot(job.snapshot)
    report, _ = evaluate(load_model(export_best(job.folder, job.recipe, outcome), snapshot), snapshot, "validation")
    measured = outcome.best.metrics["root_mean_squared_error"]
    assert report.estimates["root_mean_squared_error"].value == pytest.approx(measured, rel=1e-6)


def test_metrics_may_be_numbers_of_numpy(tmp_path: Path) -> None:
    assert run_here(make_job(tmp_path, SCALE, odd("numpys_numbers")))["best"]["metrics"]["loss"] > 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("double", "weights that are trained must be float32, but '0.weight' is torch.float64"),
        ("frozen", "the model has no weights to train"),
        ("two_of_each", "`predict` gives 'both' of shape (48,) for 24 samples"),
        ("undefined", "after epoch 1, the validation metric area is nan"),
        ("absent", "`validate` gives root_mean_squared_error, pearson, loss, but no 'area'"),
        ("one_sample_normalised", "batch normalisation got a single sample"),
        ("column_of_labels", "the predictions `value` are of shape (24, 1), the labels of (24,)"),
    ],
)
def test_what_cannot_be_is_one_clear_error(tmp_path: Path, name: str, said: str) -> None:
    scale = "w1-b4-e1-g0" if name == "one_sample_normalised" else SCALE
    with pytest.raises((TrainingFailedError, ValueError)) as caught:
        run_here(make_job(tmp_path, scale, odd(name)))
    text = explained(caught.value)
    assert re.search(re.escape(said), text)
    assert "Traceback" not in text


def test_a_report_may_look_at_rows_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpipes_tests.training import odd as workloads

    job = make_job(tmp_path, SCALE, odd("plain"))
    run_here(job)
    outcome, snapshot = Outcome.read(job.folder.result), open_snapshot(job.snapshot)
    model = load_model(export_best(job.folder, job.recipe, outcome), snapshot)
    seen = []

    def report(self: object, predictions: dict[str, np.ndarray], columns: Any, info: Any, look: Any) -> Report:
        seen.append(look(np.arange(24)[::-1][:5])["value"])
        assert seen[0] == pytest.approx(predictions["value"][:-6:-1], rel=1e-5)
        return Report({"root_mean_squared_error": Estimate(1.0, 1.0, 1.0, 24)})

    monkeypatch.setattr(workloads.Plain, "report", report)
    evaluate(model, snapshot, "validation")
    assert len(seen) == 1


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model, and its snapshot."""
    job = make_job(tmp_path_factory.mktemp("good"), SCALE, odd("plain"))
    run_here(job)
    outcome, snapshot = Outcome.read(job.folder.result), open_snapshot(job.snapshot)
    return load_model(export_best(job.folder, job.recipe, outcome), snapshot), snapshot


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scores": lambda *_: np.full(24, -np.inf)}, "24 of 24 `scores` are not finite"),
        (
            {"scores": lambda *_: np.zeros((24, 1))},
            r"`scores` gives the shape \(24, 1\); of 24 samples, it must be \(24,\)",
        ),
        ({"metric": Metric("area")}, "the report estimates pearson, .* but not the workload's metric, 'area'"),
        (
            {"report": lambda *_: Report({"root_mean_squared_error": Estimate(1.0, float("nan"), 1.0, 24)})},
            r"in the report, root_mean_squared_error is \(1.0, nan, 1.0\), which is not finite",
        ),
    ],
)
def test_what_would_pass_every_comparison_is_an_error(
    good: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    model, snapshot = good
    for name, value in changes.items():
        monkeypatch.setattr(model.workload, name, value, raising=False)
    with pytest.raises(ConfigError, match=said):
        evaluate(model, snapshot, "validation")
