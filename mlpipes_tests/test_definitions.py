"""The definitions: what they hold, how fast they load, what they must not import, and what a bad setting says."""

import cProfile
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from mlpipes.definitions import build_defs, defs
from mlpipes.errors import ConfigError
from mlpipes.orchestration.assets import workload_assets
from mlpipes.orchestration.resources import ReferenceIOManager, StoreResource
from mlpipes.orchestration.training import TrainingConfig, make_recipe
from mlpipes.scales import scales_of
from mlpipes.training.code_version import code_version, preparation_version
from mlpipes.workloads.catalog import CATALOG, Entry

CHAIN = ["dataset", "snapshot", "checkpoints", "model", "eval_report", "champion"]
HEAVY = ("torch", "torchvision", "ray", "transformers", "datasets", "mlflow", "matplotlib", "sklearn", "scipy")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, env={**os.environ, **environment}
    )


def test_loading_imports_nothing_heavy() -> None:
    found = run_python(f"import sys, mlpipes.definitions; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert found.stdout.strip() == "[]", found.stderr


def calls_to_load(path: Path, scales: int) -> int:
    """Calls of functions that it takes to build the definitions with so many scales; unlike seconds, always the same."""
    path.write_text("digits:\n" + "".join(f"  - w1-b{n}-e3-g0\n" for n in range(1, scales + 1)))
    profile = cProfile.Profile()
    with profile:
        node = build_defs().resolve_asset_graph().get(dg.AssetKey(["digits", "model"]))
        assert node.partitions_def is not None
        assert len(node.partitions_def.get_partition_keys()) == scales
    return sum(entry.callcount for entry in profile.getstats())


def test_a_thousand_scales_load_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """215 calls a scale when this was written, a tenth of a millisecond; a loop over pairs would make it many."""
    path = tmp_path / "scales.yaml"
    monkeypatch.setenv("MLPIPES_SCALES", str(path))
    few, many = (calls_to_load(path, scales) for scales in (10, 1000))
    assert many - few < 400 * 990


def test_a_bad_scale_file_says_so_when_loading(tmp_path: Path) -> None:
    path = tmp_path / "scales.yaml"
    path.write_text("digits: [w3-b64-e1-g0]")
    found = run_python("import mlpipes.definitions", MLPIPES_SCALES=str(path))
    assert found.returncode != 0
    assert f"scale file {path}, workload digits, entry 1" in found.stderr
    assert "batch_size 64 is not divisible by workers 3" in found.stderr


@pytest.mark.parametrize("entry", CATALOG, ids=lambda entry: entry.name)
def test_each_workload_has_its_chain_per_scale_and_a_report(entry: Entry) -> None:
    graph = defs.resolve_asset_graph()
    for number, name in enumerate(CHAIN):
        node = graph.get(dg.AssetKey([entry.name, name]))
        assert node.group_name == entry.name
        assert node.partitions_def is not None
        assert list(node.partitions_def.get_partition_keys()) == [scale.key for scale in entry.scales]
        assert node.owners
        assert node.kinds
        assert node.description
        assert [key.path[-1] for key in node.parent_keys] == CHAIN[max(0, number - 1) : number]
    report = graph.get(dg.AssetKey([entry.name, "scaling_report"]))
    assert report.partitions_def is None
    assert [key.path[-1] for key in report.parent_keys] == ["eval_report"]


@pytest.mark.parametrize("entry", CATALOG, ids=lambda entry: entry.name)
def test_an_asset_is_stale_by_the_code_that_makes_it(entry: Entry) -> None:
    graph, code = defs.resolve_asset_graph(), entry.implementation
    found = {name: graph.get(dg.AssetKey([entry.name, name])).code_version for name in CHAIN[:3]}
    preparing = preparation_version(code)
    assert found == {"dataset": preparing, "snapshot": preparing, "checkpoints": code_version(code)}


def test_other_code_prepares_the_snapshot_again_and_keeps_it_where_the_bytes_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, store = [], StoreResource(root=str(tmp_path))
    for code in ("first", "second", "second"):
        monkeypatch.setattr("mlpipes.orchestration.assets.preparation_version", lambda implementation, code=code: code)
        result = dg.materialize(
            workload_assets(CATALOG[0])[:2],
            partition_key=CATALOG[0].scales[0].key,
            resources={"store": store, "io_manager": ReferenceIOManager(store=store)},
        )
        requests = len(list((tmp_path / "snapshots" / "requests").iterdir()))
        found.append((result.output_for_node("digits__snapshot").digest, requests))
    (digest, _), *_ = found
    assert found == [(digest, 1), (digest, 2), (digest, 2)]


def test_training_and_evaluation_have_queues_of_their_own() -> None:
    graph = defs.resolve_asset_graph()
    pools = {name: graph.get(dg.AssetKey(["digits", name])).pools or set() for name in CHAIN}
    assert pools["checkpoints"] == {"training"}
    assert pools["eval_report"] == {"evaluation"}
    assert pools["champion"] == {"promotion"}
    assert not pools["dataset"] | pools["snapshot"] | pools["model"]


def test_a_backfill_runs_one_partition_a_run() -> None:
    for node in defs.resolve_asset_graph().asset_nodes:
        if node.partitions_def is not None:
            # Dagster's default is one run per partition. An explicit multi_run(1) makes runs over a range of one
            # partition instead, in which IO managers have no partition key.
            assert node.backfill_policy is None


def test_user_catalogs_can_be_composed() -> None:
    entry = Entry("mine", "My data", CATALOG[0].implementation, scales_of(["w1-b8-e1-g0"], "mine"))
    keys = {key.to_user_string() for key in build_defs(catalog=[entry]).resolve_asset_graph().get_all_asset_keys()}
    assert keys == {f"mine/{name}" for name in [*CHAIN, "scaling_report", "live", "predictions"]}


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(changes)


def test_the_fingerprint_depends_on_everything_that_the_model_depends_on() -> None:
    entry, key = CATALOG[0], CATALOG[0].scales[0].key
    base = make_recipe(entry, key, "s" * 64, config(), "run-1")
    assert make_recipe(entry, key, "s" * 64, config(checkpoint_every_seconds=5), "run-2") == base
    others = [
        make_recipe(entry, entry.scales[1].key, "s" * 64, config(), ""),
        make_recipe(entry, key, "t" * 64, config(), ""),
        make_recipe(entry, key, "s" * 64, config(seed=1), ""),
        make_recipe(entry, key, "s" * 64, config(hyperparameters={"width": 16}), ""),
        make_recipe(entry, key, "s" * 64, config(fresh=True), "run-1"),
        make_recipe(entry, key, "s" * 64, config(fresh=True), "run-2"),
        base.model_copy(update={"code": "other"}),
    ]
    assert len({recipe.fingerprint for recipe in [base, *others]}) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"networc": "resnet18"}, "networc: Extra inputs are not permitted.*Known: logical_shards"),
        ({"network": "resnet19"}, "network: Input should be 'digits', 'airbench' or 'resnet18'"),
        ({"learning_rate": -1}, "learning_rate: Input should be greater than 0"),
    ],
)
def test_a_bad_hyperparameter_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_recipe(CATALOG[0], CATALOG[0].scales[0].key, "s" * 64, config(hyperparameters=changes), "")
