"""A home that commit 0caf262 wrote opens: everything parses, nothing is quarantined, champions are served and beaten."""

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest
from typer.testing import CliRunner

from mlpipes.cli.app import app
from mlpipes.data.snapshot import open_snapshot, snapshot_of
from mlpipes.errors import ConfigError, FormatError
from mlpipes.evaluation import gates
from mlpipes.evaluation.compare import compare
from mlpipes.evaluation.promotion import decide
from mlpipes.evaluation.records import Evaluation, evaluations_of, open_evaluation, publish_evaluation
from mlpipes.orchestration.store_identity import check_store
from mlpipes.scales import scales_of
from mlpipes.scaling.report import Prices, make_report
from mlpipes.store.files import read_record
from mlpipes.store.layout import Store, TrainingFolder, default_store
from mlpipes.store.lease import Lease
from mlpipes.store.messages import read_messages
from mlpipes.store.outcome import Outcome
from mlpipes.store.recipe import Recipe
from mlpipes.store.references import REFERENCES, EvaluationReference
from mlpipes.store.status import all_statuses, find_training
from mlpipes.store.training_job import TrainingJob
from mlpipes.tracking.champion import Champions
from mlpipes.tracking.runs import Tracker, default_uri
from mlpipes.training.checkpoints import Checkpoints, checkpoint_rows
from mlpipes.training.model import evaluate, load_model
from mlpipes.workloads.catalog import Entry
from mlpipes_tests.upgrade.home import HOMES, unpack
from mlpipes_tests.upgrade.make_home import ENTRIES

SHAPES, DIED = ENTRIES["shapes"][1]
COUNTS = ENTRIES["counts"][1][0]


@pytest.fixture(params=sorted(HOMES))
def store(request: pytest.FixtureRequest, isolated_home: Path) -> Store:
    """The store of an old home."""
    unpack(request.param, isolated_home)
    return default_store()


@pytest.fixture(autouse=True)
def _nothing_is_quarantined(request: pytest.FixtureRequest, isolated_home: Path) -> Any:
    yield
    assert not list(isolated_home.rglob("*.corrupt-*"))


def entry(name: str) -> Entry:
    where, keys = ENTRIES[name]
    return Entry(name, "Made up", where, scales_of(keys, "test"))


def opened(store: Store, workload: str, scale: str) -> tuple[TrainingFolder, Recipe]:
    folder = find_training(store, workload, scale)
    return folder, Recipe.read(folder.recipe)


def test_what_describes_trainings_parses(store: Store) -> None:
    folders = [TrainingFolder(path) for path in store.root.glob("trainings/*/")]
    assert len(folders) == 3
    for folder in folders:
        recipe = Recipe.read(folder.recipe)
        assert recipe.fingerprint == folder.fingerprint, "its name is what it was"
        job = TrainingJob.read(folder.specification(1))
        assert job.recipe == recipe
        assert job.folder.path == folder.path
        messages, _ = read_messages(folder.messages(1))
        lines = folder.messages(1).read_text().splitlines()
        assert len(messages) == len(lines) > 5
        assert Lease.take(folder.path, "test").token == 2
        latest, complaints = Checkpoints(folder.checkpoints).latest()
        assert latest is not None
        assert complaints == []
        assert latest.step == latest.progress.step
        assert latest.model_state()
        assert latest.optimizer_states()


def test_outcomes_and_references_of_every_asset_parse(store: Store) -> None:
    for name, scale in (("shapes", SHAPES), ("counts", COUNTS)):
        folder, recipe = opened(store, name, scale)
        outcome = Outcome.read(folder.result)
        assert outcome.fingerprint == folder.fingerprint
        assert outcome.best.metrics
        for asset, kind in REFERENCES.items():
            written = store.root / "assets" / name / asset / f"{scale}.json"
            reference = store.read_reference(kind, name, scale)
            assert reference is not None
            assert reference.model_dump(mode="json") == read_record(written), "nothing is lost"
        assert outcome.model_dump(mode="json") == read_record(folder.result)
        assert recipe.workload == name


def test_status_tells_what_became_of_them(store: Store) -> None:
    found = {(s.workload, s.scale): s for s in all_statuses(store)}
    assert {key: s.state for key, s in found.items()} == {
        ("shapes", SHAPES): "finished",
        ("shapes", DIED): "failed",
        ("counts", COUNTS): "finished",
    }
    died = found["shapes", DIED]
    assert (died.step, died.total_steps, died.checkpoint) == (0, 12, 9)
    assert (died.error or "").startswith("RuntimeError: told to die")
    assert [row["state"] for row in checkpoint_rows(store, "shapes", DIED)] == ["good", "good"]
    shown = CliRunner().invoke(app, ["status"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "told to die" in shown.output


def test_the_report_has_what_is_comparable_and_passes_over_the_rest_with_a_word(store: Store) -> None:
    report = make_report(store, entry("shapes"), Prices())
    assert [row["scale"] for row in report.rows] == [SHAPES]
    assert any("trained by older code" in text for text in report.stale)
    assert any(text.startswith(f"{DIED} (training failed: RuntimeError") for text in report.missing)
    assert report.nights is not None
    assert [row[0] for row in report.nights.rows] == ["2026-11-01"]
    assert report.markdown(entry("shapes"))


def test_a_scale_of_another_metric_is_passed_over_with_a_word(store: Store) -> None:
    with pytest.raises(ConfigError, match=f"{COUNTS}.*trained before root_mean_squared_error was its metric"):
        make_report(store, entry("counts"), Prices())


def test_snapshots_open_and_their_rows_are_those_of_a_new_snapshot(store: Store) -> None:
    """What an old snapshot did not note is derived from its columns, and equals what is noted now."""
    for name, scale in (("shapes", SHAPES), ("counts", COUNTS)):
        _, recipe = opened(store, name, scale)
        old = open_snapshot(store.snapshots / recipe.snapshot)
        assert "rows" not in old.meta, "else nothing is derived"
        workload = entry(name).load()
        new, warnings = snapshot_of(Store(store.root.parent / "new"), workload.source.load().digest(), workload)
        assert warnings == []
        assert {split: old.rows(split) for split in old.counts} == new.meta["rows"]
        again, warnings = snapshot_of(store, workload.source.load().digest(), workload)
        assert warnings == []
        assert again.rows("test") == old.rows("test")


def test_the_model_evaluates_to_the_same_figures(store: Store) -> None:
    for name, scale in (("shapes", SHAPES), ("counts", COUNTS)):
        folder, recipe = opened(store, name, scale)
        snapshot = open_snapshot(store.snapshots / recipe.snapshot)
        (old, *_) = evaluations_of(store, name, scale)
        model = load_model(folder.model, snapshot)
        assert model.calibration is None, "it is evaluated as it is served"
        report, scores = evaluate(model, snapshot, "test")
        # An encoder in bf16 has been rounded at other places since.
        rounding = 1e-4 if model.meta["precision"] == "fp32" else 1e-2
        np.testing.assert_allclose(scores, old.scores(), atol=rounding)
        for metric, estimate in report.estimates.items():
            assert estimate.value == pytest.approx(old.estimate(metric).value, abs=rounding / 10)
        assert old.is_good


def test_the_champions_are_served(store: Store) -> None:
    import mlflow
    import pandas as pd

    mlflow.set_tracking_uri(default_uri())
    mlflow.set_registry_uri(default_uri())  # which a test before may have set
    for name in ENTRIES:
        current = Champions(Tracker(default_uri()), f"mlpipes-{name}").current()
        assert current is not None
        assert current.reason is not None
    served: Any = mlflow.pyfunc.load_model("models:/mlpipes-shapes@champion")
    _, recipe = opened(store, "shapes", SHAPES)
    test = open_snapshot(store.snapshots / recipe.snapshot).columns("test")
    assert (np.asarray(served.predict(np.array(test["image"]))).argmax(1) == test["label"]).mean() > 0.9
    served = mlflow.pyfunc.load_model("models:/mlpipes-counts@champion")
    found = served.predict(pd.DataFrame({"text": ["more more less less less less less less", "more " * 7 + "less"]}))
    assert found["value"].tolist() == pytest.approx([2, 7], abs=0.8)


def test_new_texts_are_predicted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlpipes.workloads.catalog.configured", lambda: (entry("counts"),))
    shown = CliRunner().invoke(app, ["predict", "counts", COUNTS, "more less less less less less less less"])
    assert shown.exit_code == 0, shown.output
    assert "value" in shown.output


def newer(store: Store, name: str, old: Evaluation, change: float, scores: np.ndarray | None = None) -> Evaluation:
    """An evaluation as it is written now: of the same weights, but from another training on a snapshot of another digest."""
    old_folder, recipe = opened(store, name, old.meta.scale)
    snapshot, folder = open_snapshot(store.snapshots / recipe.snapshot), store.training("e" * 64)
    shutil.copytree(old_folder.path, folder.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("evaluations"))
    report, found = evaluate(load_model(folder.model, snapshot), snapshot, "test")
    subject = old.meta.model_copy(
        update={
            "fingerprint": folder.fingerprint,
            "snapshot": "f" * 64,
            "rows": {split: snapshot.rows(split) for split in ("validation", "test")},
            "dagster_run_id": "of-now",
        }
    )
    return publish_evaluation(folder, report, found + change if scores is None else scores, "title", subject)


def test_the_gates_compare_with_old_evaluations_across_snapshots(store: Store) -> None:
    *_, old = before = evaluations_of(store, "shapes", SHAPES)
    worse = newer(store, "shapes", old, 0, scores=np.zeros_like(old.scores()))
    found = gates.regression(worse, before, gates.Limits())
    assert not found.passed, found.text
    assert gates.regression(newer(store, "shapes", old, 0), before, gates.Limits()).passed
    assert "comparable" not in gates.drift(worse, before, entry("shapes").load().metric, gates.Limits()).text
    assert "score per sample" in compare(store, old, worse, "accuracy").metrics


def test_an_old_champion_of_another_metric_is_beaten_by_test_scores_only(store: Store) -> None:
    reference = store.read_reference(EvaluationReference, "counts", COUNTS)
    assert reference is not None
    old = open_evaluation(store, reference)
    champion = Champions(Tracker(default_uri()), "mlpipes-counts").current()
    for change, promoted in ((0.0, False), (0.5, True), (-0.5, False)):
        decision = decide(store, entry("counts").load(), newer(store, "counts", old, change), champion)
        assert decision.promoted is promoted, decision.reason
        assert "score per sample of the same test samples" in decision.reason


def test_what_a_later_version_does_not_read_is_left_as_it_is(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each format had changed since: said clearly, and never quarantined (the fixture looks)."""
    from mlpipes.data import snapshot
    from mlpipes.evaluation import records
    from mlpipes.training import checkpoints, model

    folder, recipe = opened(store, "shapes", SHAPES)
    workload = entry("shapes").load()
    reference = store.read_reference(EvaluationReference, "shapes", SHAPES)
    assert reference is not None
    for module in (snapshot, records, checkpoints, model):
        monkeypatch.setattr(module, "VERSION", 99)
    monkeypatch.setattr(snapshot, "READABLE", frozenset({99}))
    for read in (
        lambda: open_snapshot(store.snapshots / recipe.snapshot),
        lambda: model.open_model(folder.model),
        lambda: open_evaluation(store, reference),
        lambda: Checkpoints(folder.checkpoints).latest(),
    ):
        with pytest.raises(FormatError, match="written by another version of mlpipes"):
            read()
    assert evaluations_of(store, "shapes", SHAPES) == []
    assert all("another version" in row["state"] for row in checkpoint_rows(store, "shapes", SHAPES))
    made, warnings = snapshot_of(store, workload.source.load().digest(), workload)
    assert warnings == []
    assert made.digest != recipe.snapshot


def test_dagster_adopts_the_old_store(store: Store) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        instance.report_runless_asset_event(dg.AssetMaterialization(["shapes", "checkpoints"], partition=SHAPES))
        check_store(instance, store)
