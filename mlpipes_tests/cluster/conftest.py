"""Fixtures: one cluster for a module's tests, and a namespace in it for each test."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlpipes_tests.cluster import software
from mlpipes_tests.cluster.cluster import Cluster, kubernetes_cluster
from mlpipes_tests.cluster.kubectl import in_phase

_numbers = itertools.count()


@dataclass(frozen=True)
class Namespace:
    """A namespace of its own, and the folder that its pods see as the store."""

    name: str
    store: Path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of two nodes and a control plane, ended with the module."""
    with kubernetes_cluster(tmp_path_factory.mktemp("k8s")) as started:
        yield started


def make_namespace(cluster: Cluster, name: str, store: Path) -> Namespace:
    """A namespace with claims on the host's programs and on a store, all of them bound."""
    manifests = software.namespace(name, store)
    cluster.kubectl.apply(manifests)
    for manifest in manifests:
        if manifest["kind"] == "PersistentVolumeClaim":
            claim = manifest["metadata"]["name"]
            cluster.kubectl.wait_for("pvc", claim, in_phase("Bound"), "is bound", namespace=name, vain=cluster.died)
    return Namespace(name, store)


@pytest.fixture
def namespace(cluster: Cluster, tmp_path: Path) -> Iterator[Namespace]:
    """A namespace with claims on the host's programs and on a store; gone after the test, with all that lies in it."""
    made = make_namespace(cluster, f"t{next(_numbers)}", tmp_path / "store")
    yield made
    cluster.kubectl("delete", "namespace", made.name, "--wait=true", "--timeout=180s")
    volumes = [volume["metadata"]["name"] for volume in cluster.kubectl.objects("persistentvolumes")]
    mine = [volume for volume in volumes if volume.startswith(f"{made.name}-")]
    cluster.kubectl("delete", "persistentvolume", *mine, "--ignore-not-found")
