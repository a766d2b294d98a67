"""A source is loaded once by a run that makes its snapshot, too; and what was loaded does not stay for long."""

import shutil
from pathlib import Path

import dagster as dg
import pytest

from mlpipes.data.dataset import Dataset
from mlpipes.orchestration import loaded
from mlpipes.orchestration.assets import workload_assets
from mlpipes.orchestration.resources import ReferenceIOManager, StoreResource
from mlpipes.scales import scales_of
from mlpipes.workloads.catalog import Entry
from mlpipes_tests import texts
from mlpipes_tests.conftest import tiny_dataset
from mlpipes_tests.texts import FOLDER, WORDS, write_tables

SCALE = "w1-b16-e1-g0"


def test_a_run_loads_its_source_once_and_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(write_tables(tmp_path)))
    kind, times = type(texts.words.source), list[int]()
    load = kind.load

    def counted(source: texts.Late) -> Dataset:
        times.append(1)
        return load(source)

    monkeypatch.setattr(kind, "load", counted)
    store = StoreResource(root=str(tmp_path / "store"))
    assets = workload_assets(Entry("words", "Words", WORDS, scales_of([SCALE], "test")))
    with dg.DagsterInstance.ephemeral() as instance:

        def digest_by(selection: list[str]) -> str:
            times.clear()
            result = dg.materialize(
                assets,
                selection=[dg.AssetKey(["words", name]) for name in selection],
                partition_key=SCALE,
                instance=instance,
                resources={"store": store, "io_manager": ReferenceIOManager(store=store)}
                | {name: object() for name in ("ray", "mlflow")},
            )
            (*_, last) = result.get_asset_materialization_events()
            return str(last.materialization.metadata["digest"].value)

        together = digest_by(["dataset", "snapshot"])
        assert (len(times), loaded._KEPT) == (1, {})
        assert digest_by(["dataset", "snapshot"]) == together  # of which there is a snapshot already
        assert (len(times), loaded._KEPT) == (1, {})
        shutil.rmtree(tmp_path / "store" / "snapshots")
        assert digest_by(["snapshot"]) == together  # made of what is loaded again
        assert (len(times), loaded._KEPT) == (1, {})


@pytest.mark.parametrize(
    ("selected", "kept"),
    [(None, True), (["snapshot"], True), (["dataset"], False), (["dataset", "checkpoints"], False)],
)
def test_only_what_goes_on_to_its_snapshot_is_kept(selected: list[str] | None, kept: bool) -> None:
    keys = None if selected is None else frozenset(dg.AssetKey(["words", name]) for name in selected)
    dataset = tiny_dataset()
    loaded.keep(dg.DagsterRun(job_name="j", asset_selection=keys), dg.AssetKey(["words", "snapshot"]), "d", dataset)
    assert loaded.take("d") is (dataset if kept else None)
    assert loaded.take("d") is None


def test_what_was_kept_is_dropped_by_who_wants_another() -> None:
    run, snapshot = dg.DagsterRun(job_name="j"), dg.AssetKey(["words", "snapshot"])
    loaded.keep(run, snapshot, "one", tiny_dataset())
    loaded.keep(run, snapshot, "two", tiny_dataset())
    assert list(loaded._KEPT) == ["two"]
    assert loaded.take("three") is None
    assert loaded._KEPT == {}
