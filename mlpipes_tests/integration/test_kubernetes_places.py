"""One model wherever it is trained: a process, a laptop's Ray, Slurm and Kubernetes; with one, two and four workers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlpipes_tests.cluster import conftest, trainings
from mlpipes_tests.cluster.cluster import Cluster
from mlpipes_tests.cluster.conftest import Namespace
from mlpipes_tests.integration import test_slurm
from mlpipes_tests.sandbox import Sandbox
from mlpipes_tests.slurm_cluster import SlurmCluster, slurm_cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slurm]
cluster, namespace, expected = conftest.cluster, conftest.namespace, trainings.expected
SCALES = ("w1-b128-e12-g0", "w2-b128-e12-g0", "w4-b128-e12-g0-c0.5")
"""Four workers share a laptop's two CPUs."""
DIGESTS = ("weights_digest", "order_digest", "loss_digest", "steps", "best")


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path / "slurm") as made:
        yield made
        made.ask("scancel", "--user=root")
        made.wait_until_idle()


@pytest.fixture
def laptop(tmp_path: Path) -> Iterator[Sandbox]:
    folder = tmp_path / "laptop"
    folder.mkdir()
    made = Sandbox(folder, held=True)
    yield made
    made.run(".venv/bin/mlpipes ray down")


@pytest.mark.parametrize("scale", SCALES)
def test_it_is_the_same_model_on_a_laptop_on_slurm_and_on_kubernetes(
    cluster: Cluster,
    namespace: Namespace,
    slurm: SlurmCluster,
    laptop: Sandbox,
    expected: dict[str, Any],
    tmp_path: Path,
    scale: str,
) -> None:
    found = {"one process": expected}
    done = laptop.run(f".venv/bin/python -m mlpipes_tests.held_step {scale} instance")
    assert done.returncode == 0, done.stderr[-3000:]
    laptop.run(".venv/bin/mlpipes ray down")  # its idle workers bear the fingerprint that Slurm's are waited for by
    (result,) = laptop.home.glob("store/trainings/*/result.json")
    found["laptop"] = json.loads(result.read_text())["content"]

    there = tmp_path / "on slurm"
    there.mkdir()
    on_slurm = test_slurm.Training(slurm, there, scale)
    on_slurm.settings(workers_per_node=2 if scale.startswith("w4") else 1)
    assert on_slurm.end(on_slurm.run()) == 0, on_slurm.log()[-3000:]
    found["Slurm"] = on_slurm.outcome()

    on_kubernetes = trainings.Training(cluster, namespace, scale, placement="spread", cpu_per_worker="200m")
    assert on_kubernetes.end(on_kubernetes.run()) == 0, on_kubernetes.log()[-3000:]
    found["Kubernetes"] = on_kubernetes.outcome()

    for place, outcome in found.items():
        print(f"| {scale} | {place} | {outcome['weights_digest'][:16]} | {outcome['loss_digest'][:16]} |")
        assert {name: outcome[name] for name in DIGESTS} == {name: expected[name] for name in DIGESTS}, place
