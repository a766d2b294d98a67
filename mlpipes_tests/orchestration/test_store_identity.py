"""Dagster and the store cannot be apart: ids, histories with and without one, and a store that was emptied."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg
import pytest

from mlpipes.errors import ConfigError, CorruptionError
from mlpipes.orchestration import store_identity
from mlpipes.orchestration.resources import STORE, ReferenceIOManager, StoreResource
from mlpipes.orchestration.store_identity import adopt, check_store, remembered_store, store_of_this_dagster
from mlpipes.store.identity import identify, identity_of
from mlpipes.store.layout import Store, default_store
from mlpipes.store.references import DatasetReference

PARTITION = "w1-b1-e1-g0"
REFERENCE = DatasetReference(digest="d", provenance={}, counts={})


def materialize(instance: dg.DagsterInstance, root: Path, seen: list[str] | None = None) -> dg.ExecuteInProcessResult:
    """Materialize an asset of a chain into the store, and read another store's path in the step, as checks do."""

    @dg.asset(key=["w", "dataset"], partitions_def=dg.StaticPartitionsDefinition([PARTITION]))
    def dataset(store: StoreResource) -> DatasetReference:
        if seen is not None:
            seen.append(str(store.store.root))
        return REFERENCE

    store = StoreResource(root=str(root))
    return dg.materialize(
        [dataset],
        partition_key=PARTITION,
        instance=instance,
        resources={"store": store, "io_manager": ReferenceIOManager(store=store)},
        raise_on_error=False,
    )


def failure(result: dg.ExecuteInProcessResult) -> str:
    assert not result.success
    event = next(event for event in result.all_events if event.is_step_failure)
    return event.step_failure_data.error_display_string


def test_an_id_is_given_once_to_whoever_asks(tmp_path: Path) -> None:
    stores = [Store(tmp_path / "store") for _ in range(16)]
    assert identity_of(stores[0]) is None
    with ThreadPoolExecutor(16) as pool:
        found = set(pool.map(identify, stores))
    assert found == {identity_of(stores[0])}
    assert identify(Store(tmp_path / "other")) not in found
    path = tmp_path / "store" / "store.json"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CorruptionError, match=r"store\.json"):
        identify(stores[0])


def test_a_fresh_instance_adopts_the_store_and_refuses_another(tmp_path: Path) -> None:
    first, second = Store(tmp_path / "first"), Store(tmp_path / "second")
    with dg.DagsterInstance.ephemeral() as instance:
        assert materialize(instance, first.root).success
        assert remembered_store(instance) == (identity_of(first), str(first.root))
        event = instance.get_latest_materialization_event(dg.AssetKey(["w", "dataset"]))
        assert event is not None
        assert event.asset_materialization is not None
        assert event.asset_materialization.metadata[STORE].value == identity_of(first)
        identify(second)
        message = failure(materialize(instance, second.root))
        for part in (str(identity_of(first)), str(first.root), str(identity_of(second)), str(second.root), "--adopt"):
            assert part in message
        assert second.read_reference(DatasetReference, "w", PARTITION) is None, (
            "nothing was written into the wrong store"
        )
        assert materialize(instance, first.root).success, "the right one is still the right one"


def test_the_first_of_two_runs_at_once_does_not_make_the_other_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, looked = Store(tmp_path / "store"), store_identity.is_empty
    with dg.DagsterInstance.ephemeral() as instance:

        def looked_before_the_other_wrote(asked: Store) -> bool:
            empty = looked(asked)
            monkeypatch.setattr(store_identity, "is_empty", looked)
            assert materialize(instance, store.root).success  # the other one, from its adoption to its event
            return empty

        monkeypatch.setattr(store_identity, "is_empty", looked_before_the_other_wrote)
        check_store(instance, store)
        assert remembered_store(instance) == (identity_of(store), str(store.root))


def test_a_step_that_only_reads_is_told_too(tmp_path: Path) -> None:
    seen: list[str] = []
    with dg.DagsterInstance.ephemeral() as instance:
        assert materialize(instance, tmp_path / "first", seen).success
        assert seen == [str(tmp_path / "first")]
        assert "is about store" in failure(materialize(instance, tmp_path / "second", seen))
    assert len(seen) == 1, "refused before the step had it"


def test_a_store_that_was_deleted_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with dg.DagsterInstance.ephemeral() as instance:
        assert materialize(instance, store.root).success
        old = identity_of(store)
        shutil.rmtree(store.root)
        with pytest.raises(ConfigError, match=f"about store {old} .* has no id and is empty"):
            check_store(instance, store)
        adopt(instance, store)
        check_store(instance, store)
        assert materialize(instance, store.root).success
        assert identity_of(store) != old


def test_history_of_before_there_were_ids_is_adopted_unless_the_store_is_empty(tmp_path: Path) -> None:
    full, empty = Store(tmp_path / "full"), Store(tmp_path / "empty")
    full.write_reference(REFERENCE, "w", PARTITION)
    with dg.DagsterInstance.ephemeral() as instance:
        instance.report_runless_asset_event(dg.AssetMaterialization(["w", "dataset"], partition=PARTITION))
        with pytest.raises(ConfigError, match=r"w/dataset is materialized, but the store .*empty is empty"):
            check_store(instance, empty)
        assert identity_of(empty) is None
        assert remembered_store(instance) is None
        check_store(instance, full)
        assert remembered_store(instance) == (identity_of(full), str(full.root))


def test_assets_of_others_in_a_shared_dagster_are_none_of_ours(tmp_path: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        instance.report_runless_asset_event(dg.AssetMaterialization(["warehouse", "orders"]))
        instance.report_runless_asset_event(dg.AssetMaterialization("model"))
        check_store(instance, Store(tmp_path / "store"))


def test_a_foreign_dagster_home_remembers_and_the_command_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(foreign))
    assert "with none yet" in store_of_this_dagster(adopting=False)
    assert identity_of(default_store()) is None, "looking decides nothing"
    with dg.DagsterInstance.from_config(str(foreign)) as instance:
        assert materialize(instance, default_store().root).success
    assert "is about the same" in store_of_this_dagster(adopting=False)
    identity = identity_of(default_store())
    monkeypatch.setenv("MLPIPES_HOME", str(tmp_path / "another"))
    with pytest.raises(ConfigError, match=f"about store {identity} "):
        store_of_this_dagster(adopting=False)
    assert "from now on" in store_of_this_dagster(adopting=True)
    assert "is about the same" in store_of_this_dagster(adopting=False)
