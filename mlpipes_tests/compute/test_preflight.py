import socket
from pathlib import Path

import pytest

from mlpipes.compute import preflight
from mlpipes.compute.address import RayAddress
from mlpipes.compute.places import resolve
from mlpipes.compute.preflight import (
    GIB,
    Node,
    check_cluster,
    check_disk,
    check_elastic,
    check_shards,
    nodes_of,
    workers_that_fit,
)
from mlpipes.errors import ConfigError, PreflightError
from mlpipes.scales import RayScaleConfig

LAPTOP = Node("laptop", cpus=2, gpus=0, memory_bytes=16 * GIB)
SERVER = Node("server", cpus=16, gpus=4, memory_bytes=128 * GIB)


def scale(key: str) -> RayScaleConfig:
    return RayScaleConfig.from_key(key)


@pytest.mark.parametrize(
    ("key", "nodes", "fit"),
    [
        ("w2-b8-e1-g0", [LAPTOP], 2),
        ("w4-b8-e1-g0", [LAPTOP], 2),
        ("w4-b8-e1-g0-c0.5", [LAPTOP], 4),
        ("w1-b8-e1-g1", [LAPTOP], 0),
        ("w4-b8-e1-g1", [LAPTOP, SERVER], 4),
        ("w8-b8-e1-g0.5", [SERVER], 8),
        ("w1-b8-e1-g0-c3", [LAPTOP, LAPTOP], 0),  # 4 CPUs in all, but no node has 3
        ("w1-b8-e1-g0", [Node("small", 8, 0, 0.5 * GIB)], 0),
        ("w1-b8-e1-g0", [], 0),
    ],
)
def test_workers_are_placed_node_by_node(key: str, nodes: list[Node], fit: int) -> None:
    assert workers_that_fit(scale(key), nodes, data_bytes=1000) == fit


def test_what_is_missing_and_what_is_there_is_said() -> None:
    with pytest.raises(PreflightError) as caught:
        check_cluster(scale("w4-b8-e1-g1"), [LAPTOP], 0)
    for part in (
        "w4-b8-e1-g1",
        "4 workers",
        "1 GPUs",
        "can place 0",
        "laptop: 2 CPUs, 0 GPUs, 16.0 GiB",
        "Nothing was",
    ):
        assert part in str(caught.value)
    check_cluster(scale("w2-b8-e1-g0"), [LAPTOP], 0)


def test_batches_and_shards_must_fit_the_training() -> None:
    with pytest.raises(PreflightError, match="`logical_shards` to at least 8"):
        check_shards(scale("w8-b64-e1-g0"), 4, 1000)
    with pytest.raises(PreflightError, match="training split has only 63 samples"):
        check_shards(scale("w1-b64-e1-g0"), 4, 63)


def test_a_full_disk_is_noticed_before_the_start(tmp_path: Path) -> None:
    check_disk(tmp_path / "new")
    with pytest.raises(PreflightError, match="Make room, or set MLPIPES_HOME"):
        check_disk(tmp_path, needed_bytes=1 << 60)


def test_a_cluster_that_does_not_answer_is_an_error_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never says a word
        address = RayAddress(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(PreflightError, match=r"does not answer.*read timeout=0\.5"):
            nodes_of(address)
    with pytest.raises(PreflightError, match="does not answer"):
        nodes_of(address)


def test_an_address_must_be_a_dashboards() -> None:
    with pytest.raises(ConfigError, match="such as http://ray-head:8265"):
        resolve("ray://head:10001")
    assert resolve("http://head:8265/").dashboard == "http://head:8265"


def test_an_elastic_training_needs_its_least_workers_and_ordered_sums() -> None:
    elastic = scale("w4-b8-e1-g0")
    check_cluster(elastic, [LAPTOP], 0, min_workers=2)
    with pytest.raises(PreflightError, match="needs 3 workers"):
        check_cluster(elastic, [LAPTOP], 0, min_workers=3)
    check_elastic(elastic, None, "allreduce")
    check_elastic(elastic, 4, "ordered")
    with pytest.raises(PreflightError, match="has at most 4 workers"):
        check_elastic(elastic, 5, "ordered")
    with pytest.raises(PreflightError, match="use `ordered`"):
        check_elastic(elastic, 2, "allreduce")
