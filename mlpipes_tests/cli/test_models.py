"""What the command line says of models: their weights by one digest, compared only with their like, asked with pairs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mlpipes.cli.app import app
from mlpipes.data.snapshot import open_snapshot
from mlpipes.evaluation.records import Evaluation, Subject, publish_evaluation
from mlpipes.orchestration.training import _metadata
from mlpipes.reporting.classification import wilson
from mlpipes.reporting.report import Report
from mlpipes.store.layout import Store
from mlpipes.store.outcome import Outcome
from mlpipes.store.references import ModelReference
from mlpipes.store.training_job import TrainingJob
from mlpipes.training.model import evaluate, export_best, load_model, predict_texts
from mlpipes.workloads.catalog import entry_named
from mlpipes.workloads.image_classification import ImageClassification
from mlpipes_tests.texts import FOLDER, PAIRS, write_tables
from mlpipes_tests.training.harness import make_job, run_here

SCALE, N = "w1-b512-e2-g0", 400


@dataclass(frozen=True)
class Trained:
    """Digits after two epochs, of which the first was chosen."""

    home: Path
    job: TrainingJob
    outcome: Outcome


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    home = tmp_path_factory.mktemp("home")
    job = make_job(home / "store", SCALE)
    job.recipe.write_to(job.folder.recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageClassification, "selection_key", lambda _, metrics: (metrics["loss"],))
        run_here(job)
    return Trained(home, job, Outcome.read(job.folder.result))


def said(*arguments: str, code: int = 0) -> str:
    """What a command prints, in a terminal that cuts nothing."""
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, arguments)
    assert result.exit_code == code, result.output
    return " ".join((result.output if code == 0 else result.stderr).split())


def test_everyone_shows_the_weights_of_the_chosen_epoch(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPIPES_HOME", str(trained.home))
    job, outcome, snapshot = trained.job, trained.outcome, open_snapshot(trained.job.snapshot)
    assert (outcome.best.epoch, outcome.best.step) == (1, outcome.steps // 2)
    of_checkpoints = _metadata(entry_named("digits"), job.recipe, outcome, job.folder)
    model = load_model(export_best(job.folder, job.recipe, outcome), snapshot)
    chosen = model.meta["weights_digest"]
    assert of_checkpoints["weights_digest"] == chosen
    assert of_checkpoints["last_step_weights_digest"] == outcome.weights_digest != chosen
    report, scores = evaluate(model, snapshot, "test")
    subject = Subject(
        workload="digits", scale=SCALE, seed=0, fingerprint=job.folder.fingerprint, weights=chosen, night=None,
        snapshot=snapshot.digest, split="test", n=len(scores), data="real", dagster_run_id="1" * 8,
    )  # fmt: skip
    evaluations = [publish_evaluation(job.folder, report, scores, "title", subject) for _ in range(2)]
    assert chosen[:12] in (evaluations[0].path / "report.md").read_text()
    assert chosen[:8] in said("history", "digits", SCALE)
    names = [f"digits/{SCALE}@{evaluation.name}" for evaluation in evaluations]
    assert f"the same model, bit for bit (weights {chosen[:12]})" in said("compare", *names)
    (job.folder.checkpoints / f"step-{outcome.best.step:08d}" / "model.safetensors").write_bytes(b"")
    again = _metadata(entry_named("digits"), job.recipe, outcome, job.folder)
    assert again["weights_digest"] == "its checkpoint cannot be read", "never those of another epoch"


def evaluated(store: Store, workload: str, rows: str, right: int = 300, fingerprint: str = "f" * 64) -> Evaluation:
    """A made-up evaluation of a scale of a workload, on some test rows."""
    entry = entry_named(workload)
    metric = entry.load().metric.name
    subject = Subject(
        workload=workload, scale=entry.scales[0].key, seed=0, fingerprint=fingerprint, weights=f"{right:064d}",
        snapshot=rows, rows={"test": rows}, split="test", n=N, data="made up", night=None, dagster_run_id="2" * 8,
    )  # fmt: skip
    scores = (np.arange(N) < right).astype(np.float32)
    return publish_evaluation(store.training(fingerprint), Report({metric: wilson(right, N)}), scores, "title", subject)


def test_models_of_different_tasks_are_not_compared(isolated_home: Path) -> None:
    store = Store(isolated_home / "store")
    names = [f"{name}/{entry_named(name).scales[0].key}" for name in ("digits", "docstrings")]
    evaluated(store, "digits", "pictures")
    evaluated(store, "docstrings", "texts", fingerprint="e" * 64)
    for first, second in (names, names[::-1]):
        error = said("compare", first, second, code=1)
        assert error.startswith(f"ConfigError: {first} and {second} are models of different tasks: ")
        for part in ("digits is measured by accuracy", "docstrings", "Compare models of one workload"):
            assert part in error.replace("docstrings is measured by accuracy, digits by", "digits is measured by")


@pytest.mark.parametrize(
    ("rows", "test"),
    [
        ("s", "compared on the same 400 test samples. Test used: McNemar, exact, p=1.82e-12."),
        ("other", "Test used: none; what is shown is the interval of the difference"),
    ],
)
def test_a_comparison_names_the_test_that_it_used(
    rows: str, test: str, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLPIPES_HOME", str(trained.home))
    store = Store(trained.home / "store")
    scale = entry_named("digits").scales[0].key
    found = [
        evaluated(store, "digits", on, right, trained.job.folder.fingerprint) for on, right in (("s", 300), (rows, 340))
    ]
    # 40 samples are won and none is lost: 2 · 2⁻⁴⁰ by the binomial distribution.
    assert test in said("compare", *(f"digits/{scale}@{evaluation.name}" for evaluation in found))


def test_predict_reads_pairs_where_the_workload_does(
    isolated_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlpipes.cli import models

    monkeypatch.setenv(FOLDER, str(write_tables(tmp_path)))
    monkeypatch.setattr(models, "scale_named", lambda workload, scale: scale)
    store, scale = Store(isolated_home / "store"), "w1-b16-e2-g0"
    job = make_job(store.root, scale, PAIRS, learning_rate=1e-3)
    run_here(job)
    folder = export_best(job.folder, job.recipe, Outcome.read(job.folder.result))
    reference: dict[str, Any] = {"fingerprint": job.folder.fingerprint, "mlflow_run_id": "r", "version": "1"}
    store.write_reference(
        ModelReference(**reference, snapshot=job.recipe.snapshot, registered_model="m"), "pairs", scale
    )
    asked, seconds = ["it is red", "it is blue"], ["it is red indeed", "it is red indeed"]
    command = ["predict", "pairs", scale]
    error = said(*command, *asked, code=1)
    assert f'with --pair, for example mlpipes predict pairs {scale} "first text" --pair "second text"' in error
    assert "(got 2 and 1)" in said(*command, *asked, "--pair", seconds[0], code=1)
    snapshot = open_snapshot(job.snapshot)
    answers = predict_texts(load_model(folder, snapshot), snapshot, asked, seconds)
    given = said(*command, *asked, "--pair", seconds[0], "--pair", seconds[1])
    for row, text in enumerate(asked):
        cells = [answers["label"][row], *(f"{answers[name][row]:.3f}" for name in ("p(0)", "p(1)"))]
        assert " │ ".join([text, *cells]) in given.replace("it is red  ", "it is red "), given
    other = predict_texts(load_model(folder, snapshot), snapshot, asked[:1], ["it is green indeed"])
    assert abs(other["p(0)"][0] - answers["p(0)"][0]) > 1e-6, "the second text counts"
