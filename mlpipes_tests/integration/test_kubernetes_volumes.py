"""Volumes that are full, that cannot be written, or are another than where the run is; and KubeRay's kinds of long ago."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlpipes_tests.chaos.session import small_disk
from mlpipes_tests.cluster import build, software, trainings
from mlpipes_tests.cluster.cluster import Cluster, kubernetes_cluster
from mlpipes_tests.cluster.conftest import Namespace, make_namespace
from mlpipes_tests.cluster.kubectl import in_phase
from mlpipes_tests.cluster.trainings import EARLY, ONE, Training, assert_equal
from mlpipes_tests.disks import fill

pytestmark = pytest.mark.cluster
expected = trainings.expected
MESSAGES_BYTES, TOO_MUCH_BYTES = 64 << 10, 400 << 20
"""Of a full disk: what messages need and no checkpoint has room in; and more than preflight lets be used."""
OLD = "github.com/ray-project/kuberay/ray-operator@v1.2.2"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small disk, which nodes see if it was there before them."""
    folder = tmp_path_factory.mktemp("disk")
    small_disk(folder)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def cluster(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with kubernetes_cluster(tmp_path_factory.mktemp("k8s")) as started:
        yield started


def training_in(cluster: Cluster, name: str, store: Path) -> Training:
    return Training(cluster, make_namespace(cluster, name, store), ONE)


def test_on_a_full_volume_a_training_waits_for_room_and_another_is_not_begun(
    cluster: Cluster, disk: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    training = training_in(cluster, "full", disk / "store")
    training.logs, training.instance = tmp_path, tmp_path / "instance"  # Dagster has another disk
    tmp_path.chmod(0o777)
    training.barriers.close(EARLY)
    run = training.run()
    training.until_barrier(EARLY)
    ballast = fill(disk)
    os.truncate(ballast, ballast.stat().st_size - MESSAGES_BYTES)
    training.barriers.open()
    training.until_said("is full; training waits for room")
    ballast.unlink()
    assert training.end(run) == 0, training.log()[-5000:]
    assert_equal(training.outcome(), expected)
    assert training.outcome()["attempt"] == 1
    training.assert_nothing_is_left()

    training.scale = ONE.replace("e12", "e11")
    os.truncate(fill(disk), TOO_MUCH_BYTES)
    assert training.end(training.run()) == 1
    assert "GiB free; checkpoints need" in training.log(), training.log()[-3000:]
    assert "Nothing was started." in training.log()
    training.assert_nothing_is_left()


def test_a_volume_that_pods_may_only_read_is_told(cluster: Cluster, tmp_path: Path) -> None:
    training = training_in(cluster, "readonly", tmp_path / "store")
    claim = {"name": "store", "persistentVolumeClaim": {"claimName": "store", "readOnly": True}}
    others = [volume for volume in software.volumes() if volume["name"] != "store"]
    training.change(
        head_pod={"spec": {"volumes": [claim, *others]}}, worker_pod={"spec": {"volumes": [claim, *others]}}
    )
    assert training.end(training.run()) == 1
    assert "Read-only file system, in a pod of user 1000: it has to write the store" in training.log(), training.log()
    training.assert_nothing_is_left()


def test_a_volume_that_is_another_one_is_told(cluster: Cluster, tmp_path: Path) -> None:
    training = training_in(cluster, "another", tmp_path / "store")
    (elsewhere := tmp_path / "elsewhere").mkdir()
    elsewhere.chmod(0o777)
    name, kubectl = training.namespace.name, cluster.kubectl
    kubectl.apply(software.volume(name, "elsewhere", elsewhere, "ReadWriteMany"))
    spec = {"accessModes": ["ReadWriteMany"], "storageClassName": "", "volumeName": f"{name}-elsewhere"}
    metadata = {"name": "elsewhere", "namespace": name}
    spec |= {"resources": {"requests": {"storage": "1Gi"}}}
    kubectl.apply({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec})
    kubectl.wait_for("pvc", "elsewhere", in_phase("Bound"), "is bound", namespace=name)
    training.change(store=training.settings["store"] | {"claim": "elsewhere"})
    assert training.end(training.run()) == 1
    assert "is not there in the pod: `store.claim` is another volume than the run's" in training.log(), training.log()[
        -3000:
    ]
    training.assert_nothing_is_left()


class OfOld(Training):
    """Where there is no Kueue."""

    kinds = "rayjobs,rayclusters,pods,services,secrets,configmaps,jobs"


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster with the kinds of an old KubeRay, and nobody who acts on them."""
    with kubernetes_cluster(tmp_path / "old", nodes=1, operators=()) as started:
        folder = Path(json.loads(build._go("mod", "download", "-json", OLD, folder=Path("/")))["Dir"])
        started.kubectl("create", "-f", str(folder / "config" / "crd" / "bases"))
        yield started


def test_kinds_of_an_old_kuberay_are_told(old: Cluster, tmp_path: Path) -> None:
    made: Namespace = make_namespace(old, "old", tmp_path / "store")
    training = OfOld(old, made, ONE)
    assert training.end(training.run()) == 1
    assert "KubeRay's own kinds are older than 1.6" in training.log(), training.log()[-3000:]
    training.assert_nothing_is_left()
