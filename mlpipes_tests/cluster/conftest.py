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


@pytest.fixture
def namespace(cluster: Cluster, tmp_path: Path) -> Iterator[Namespace]:
    """A namespace with claims on the host's programs and on a store; gone after the test, with all that lies in it."""
    made = Namespace(f"t{next(_numbers)}", tmp_path / "store")
    manifests = software.namespace(made.name, made.store)
    cluster.kubectl.apply(manifests)
    for manifest in manifests:
        if manifest["kind"] == "PersistentVolumeClaim":
            claim = manifest["metadata"]["name"]
            bound = in_phase("Bound")
            cluster.kubectl.wait_for("pvc", claim, bound, "is bound", namespace=made.name, vain=cluster.died)
    yield made
    volumes = [m["metadata"]["name"] for m in manifests if m["kind"] == "PersistentVolume"]
    cluster.kubectl("delete", "namespace", made.name, "--wait=true", "--timeout=180s")
    cluster.kubectl("delete", "persistentvolume", *volumes)
