"""The dry run: a mistake in any method of a workload is said before the first step, and a right one is left alone."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mlpipes.errors import TrainingFailedError
from mlpipes.reporting.report import Report
from mlpipes.training import worker
from mlpipes.training.dry_run import DryRun
from mlpipes.training.loop import Trainer
from mlpipes.workloads.base import Workload
from mlpipes.workloads.deployables import PythonCode, TorchProgram
from mlpipes_tests.training import odd
from mlpipes_tests.training.harness import make_job, run_here

PLAIN = "mlpipes_tests.training.odd:plain"
SCALE = "w1-b12-e1-g0"
METHODS = (
    *(
        "lengths",
        "build_model",
        "initialize",
        "state",
        "load_state",
        "optimizers",
        "learning_rate_factor",
        "stage",
        "gradient_clip",
    ),
    *(
        "micro_batches",
        "batch",
        "loss",
        "weight",
        "predict",
        "served_batch",
        "outputs",
        "validate",
        "selection_key",
        "calibrate",
        "report",
        "scores",
    ),
    "deployable",
)


@pytest.fixture(autouse=True)
def no_step(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    def step(self: Any) -> None:
        raise AssertionError("a step was made")

    if "trains" not in request.node.name:
        monkeypatch.setattr(Trainer, "_step", step)


def said_of(folder: Path) -> str:
    with pytest.raises(TrainingFailedError) as caught:
        run_here(make_job(folder, SCALE, PLAIN))
    return str(caught.value)


def divides(*arguments: Any, **options: Any) -> Any:
    return 1 / 0


@pytest.mark.parametrize("method", METHODS)
def test_an_error_of_each_method_names_workload_method_and_line(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(self: Any, *arguments: Any, **options: Any) -> Any:
        return divides()

    fault.__code__ = fault.__code__.replace(co_name=method)
    monkeypatch.setattr(odd.Plain, method, fault)
    said = said_of(tmp_path)
    assert re.fullmatch(rf"plain: `{method}` raised ZeroDivisionError: .* \(.*test_dry_run\.py, line \d+\)", said), said


def test_no_method_of_the_contract_is_left_out() -> None:
    own = {name for name, found in vars(Workload).items() if inspect.isfunction(found)}
    before = {"prepare", "statistics"}  # when the snapshot was made
    where = {"calibrated": "`calibrate` gives parameters", "served_length": "`lengths` gives any"}
    assert own - before == {*METHODS, *where}


class _Branching(nn.Module):
    """What it computes depends on the numbers that it gets, which no exported program can."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, 0] if rows.sum().item() > 0 else rows[:, 1]


@pytest.mark.parametrize(
    ("method", "found", "said"),
    [
        ("validate", lambda *_: {"loss": 1.0}, "`validate` gives loss, but no 'root_mean_squared_error'"),
        ("validate", lambda *_: {"root_mean_squared_error": 1.0}, "but no 'loss'"),
        ("validate", lambda *_: None, "`validate` gives NoneType; it must give a dictionary"),
        ("validate", lambda *_: {"loss": 1.0, "root_mean_squared_error": "1"}, "`validate` gives str for"),
        ("report", lambda *_: Report({}), "`report` has estimates of nothing, but none of the workload's metric"),
        ("report", lambda *_: {}, "`report` gives dict; it must give a `Report`"),
        ("scores", lambda *_: np.zeros(3), r"`scores` gives float64 of shape \(3,\) for 24 samples"),
        (
            "loss",
            lambda self, model, batch, hp: model(batch["row"]),
            r"`loss` gives shape \(3,\); it must give one number",
        ),
        ("loss", lambda *_: torch.zeros(()), "`loss` does not depend on any weight"),
        ("loss", lambda *_: 1.0, "`loss` gives float"),
        ("weight", lambda self, batch, hp: batch["label"], r"`weight` gives shape \(3,\)"),
        ("learning_rate_factor", lambda *_: None, "`learning_rate_factor` gives None at 0.0"),
        ("stage", lambda *_: None, "`stage` gives NoneType; it must give a Hyperparameters"),
        ("stage", lambda self, progress, hp: hp if progress < 0.9 else {}, "`stage` gives dict"),
        ("gradient_clip", lambda *_: 0.0, "`gradient_clip` gives 0.0"),
        ("micro_batches", lambda self, columns, rows, hp: [rows[:1]], "`micro_batches` does not give the rows"),
        ("optimizers", lambda *_: [], r"`optimizers` gives \[\]"),
        (
            "load_state",
            lambda self, model, state: nn.init.ones_(model[0].weight),
            "gives another model than the one whose",
        ),
        ("calibrate", lambda *_: {"temperature": 1.0}, "`calibrate` gives dict; it must give a `Calibration`"),
        ("deployable", lambda *_: None, "`deployable` gives NoneType"),
        (
            "deployable",
            lambda self, model, hp, info, columns: TorchProgram(model, np.zeros((4, 7), np.float32)),
            "a program that does not take its example",
        ),
        (
            "deployable",
            lambda self, model, hp, info, columns: TorchProgram(_Branching(), np.array(columns["row"][:4])),
            "a program that torch cannot export: .*data-dependent",
        ),
        (
            "deployable",
            lambda *_: PythonCode(Path("absent.py"), lambda folder: None, {}, {}),
            "`deployable` names absent.py as its code; there is no such file",
        ),
        (
            "deployable",
            lambda *_: PythonCode(Path(__file__), divides, {}, {}),
            r"a model that cannot be written: ZeroDivisionError: .*\(.*test_dry_run\.py, line \d+\)",
        ),
        (
            "deployable",
            lambda *_: PythonCode(Path(__file__), lambda folder: (folder / "no" / "x").touch(), {}, {}),
            r"a model that cannot be written: FileNotFoundError: .*no/x.*\(.*test_dry_run\.py, line \d+\)",
        ),
    ],
)
def test_what_a_method_must_give_is_said(
    method: str, found: Callable[..., Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(odd.Plain, method, found)
    text = said_of(tmp_path)
    assert re.search(said, text), text
    assert text.startswith("plain: `")


@pytest.mark.parametrize(
    ("calibrated", "said"),
    [
        (lambda *_: None, "`calibrated` gives NoneType; it must give a model"),
        (lambda self, model, calibration: nn.Linear(7, 3), "a program that does not take its example"),
    ],
)
def test_what_is_deployed_is_the_calibrated_model(
    calibrated: Callable[..., Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlpipes_tests.training.blobs import Blobs

    monkeypatch.setattr(Blobs, "calibrated", calibrated)
    with pytest.raises(TrainingFailedError, match=said):
        run_here(make_job(tmp_path, "w1-b64-e1-g0", "mlpipes_tests.training.blobs:blobs"))


def test_figures_that_a_few_rows_do_not_define_are_asked_of_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlpipes.training import dry_run

    asked = []

    def scores(self: Any, predictions: dict[str, np.ndarray], columns: Any) -> np.ndarray:
        asked.append(len(predictions["value"]))
        return predictions["value"] if len(asked) > 1 else divides()

    monkeypatch.setattr(odd.Plain, "scores", scores)
    monkeypatch.setattr(dry_run, "EVALUATED", 5)
    with pytest.raises(AssertionError, match="a step was made"):
        run_here(make_job(tmp_path, SCALE, PLAIN))
    assert asked == [5, 24]


def test_it_trains_to_the_same_bits_with_it_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "mlpipes_tests.training.odd:other_random_numbers"
    first = run_here(make_job(tmp_path / "with", SCALE, name))
    monkeypatch.setattr(worker.DryRun, "run", lambda self: None)
    second = run_here(make_job(tmp_path / "without", SCALE, name))
    assert first["weights_digest"] == second["weights_digest"]
    assert first["loss_digest"] == second["loss_digest"]


def test_it_trains_on_from_a_checkpoint_without_another_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, SCALE, PLAIN)
    before = run_here(job)
    (job.folder.result).unlink()
    monkeypatch.setattr(worker.DryRun, "run", divides)
    assert run_here(job)["weights_digest"] == before["weights_digest"]


def test_what_was_passed_is_not_run_again_until_something_that_trains_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[object] = []
    run = DryRun.run
    monkeypatch.setattr(DryRun, "run", lambda self: (ran.append(self), run(self))[1])
    for scale, seed, options, expected in (
        (SCALE, 0, {}, 1),
        (SCALE, 1, {}, 1),
        ("w1-b12-e2-g0", 0, {}, 1),
        (SCALE, 0, {"micro_batch": 4}, 2),
    ):
        run_here(make_job(tmp_path, scale, PLAIN, seed=seed, **options))
        assert len(ran) == expected, (scale, seed, options)


def test_what_was_not_passed_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(odd.Plain, "validate", lambda *_: None)
    for _ in range(2):
        assert "`validate` gives NoneType" in said_of(tmp_path)


def test_each_step_trains_with_the_hyperparameters_of_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, batch = set[int](), odd.Plain.batch

    def noted(self: Any, columns: Any, rows: Any, hp: Any, *, augment: bool) -> Any:
        if augment:
            trained.add(hp.micro_batch)
        return batch(self, columns, rows, hp, augment=augment)

    monkeypatch.setattr(
        odd.Plain, "stage", lambda self, progress, hp: hp.model_copy(update={"micro_batch": 100 + int(progress * 1000)})
    )
    monkeypatch.setattr(odd.Plain, "batch", noted)
    steps = run_here(make_job(tmp_path, SCALE, PLAIN))["steps"]
    places = {100 + int(step / steps * 1000) for step in range(steps)}
    assert len(places) == steps > 4
    assert trained == places | {100 + 999}, "and the dry run's last"
