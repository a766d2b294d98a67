"""A source is loaded once by a run that makes its snapshot, too; and what was loaded does not stay for long."""

import copy
import shutil
from pathlib import Path

import dagster as dg
import pytest

from mlpipes.data.dataset import Dataset
from mlpipes.data.tables import TableSource
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
    times, load = list[int](), TableSource.load

    def counted(source: TableSource) -> Dataset:
        times.append(1)
        return load(source)

    monkeypatch.setattr(TableSource, "load", counted)
    workload = copy.copy(texts.words)
    workload.source = TableSource(str(tmp_path / "words.jsonl"))
    monkeypatch.setattr(texts, "words", workload)
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


def test_one_is_kept_and_only_for_its_workload() -> None:
    source, dataset = TableSource("words.jsonl"), tiny_dataset()
    loaded.keep("words", "digest", dataset, source)
    assert loaded.take("words", "digest") is dataset
    assert loaded.take("words", "digest") is None
    for other in (("words", "other"), ("letters", "digest")):
        loaded.keep("words", "digest", dataset, source)
        assert loaded.take(*other) is None
        assert loaded._KEPT == {}, "nobody asks for it any more"
    loaded.keep("words", "digest", dataset, source)
    loaded.keep("letters", "digest", dataset, source)
    assert list(loaded._KEPT) == [("letters", "digest")]
    loaded.drop()
    assert loaded._KEPT == {}


def test_a_source_of_somebody_else_is_loaded_again() -> None:
    loaded.keep("words", "digest", tiny_dataset(), TableSource("words.jsonl"))
    loaded.keep("words", "digest", tiny_dataset(), texts.Late("words.jsonl"))
    assert loaded._KEPT == {}
