"""The chart's network policies, enforced by an agent on every node: what an intruder's pod reaches without and with them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlpipes_tests import evidence
from mlpipes_tests.cluster import conftest, intruder, software, trainings
from mlpipes_tests.cluster.chart import RELEASE, Desk
from mlpipes_tests.cluster.cluster import Cluster, kubernetes_cluster
from mlpipes_tests.cluster.conftest import Namespace
from mlpipes_tests.cluster.kubectl import in_phase
from mlpipes_tests.cluster.trainings import EARLY, TWO, Training, assert_equal
from mlpipes_tests.integration.test_kubernetes_chart import mlpipes

pytestmark = pytest.mark.cluster
namespace, expected = conftest.namespace, trainings.expected
PORTS = {"webserver": {3000}, "code": {4000}, "mlflow": {5000}, "postgres": {5432}, "head": {6379, 8265}}
"""What listens in which pod, at least."""
ASK = """\
import sys, urllib.request
try:
    print(urllib.request.urlopen(sys.argv[1], timeout=60).status)
except urllib.request.HTTPError as refusal:
    print(refusal.code)
"""
DASHBOARD = "http://{}:8265/api/jobs/"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster on which policies are enforced."""
    with kubernetes_cluster(tmp_path_factory.mktemp("k8s"), policies=True) as started:
        yield started


@pytest.fixture
def desk(cluster: Cluster, namespace: Namespace) -> Iterator[Desk]:
    made = Desk(cluster, namespace, networkPolicies={"enabled": False})
    evidence.collect_from(namespace.store)
    yield made
    cluster.kubectl("delete", "persistentvolume", f"{namespace.name}-data-{RELEASE}-postgres-0", "--wait=false")


class Intruder:
    """Somebody's pod in the namespace, with none of its labels, that is told what to run."""

    def __init__(self, cluster: Cluster, namespace: Namespace) -> None:
        self.kubectl, self.name = cluster.kubectl, namespace.name
        spec = software.pod_spec(["sleep", "infinity"])
        self.kubectl.apply(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "intruder", "namespace": self.name}, "spec": spec}
        )
        self.kubectl.wait_for("pod", "intruder", in_phase("Running"), "runs", namespace=self.name)

    def runs(self, *command: str) -> str:
        """The output of a command in it."""
        return self.kubectl.execute("intruder", *command, namespace=self.name)

    def finds(self, addresses: dict[str, str]) -> dict[str, set[int]]:
        """The open ports of addresses, by what they are the addresses of; those with none are left out."""
        program = Path(intruder.__file__).read_text(encoding="utf-8")
        found = json.loads(self.runs("python3", "-c", program, *addresses.values()).splitlines()[-1])
        return {part: set(found[address]) for part, address in addresses.items() if found[address]}


def addresses_of(training: Training, desk: Desk) -> dict[str, str]:
    """Of a pod of each part, and of the training's."""
    parts = ("webserver", "daemon", "code", "mlflow", "postgres")
    pods = {part: desk.pods(part)[0] for part in parts} | {role: training.pods(role)[0] for role in ("head", "worker")}
    return {name: pod["status"]["podIP"] for name, pod in pods.items()}


def test_an_intruder_reaches_nothing_once_policies_are_enforced(
    cluster: Cluster, namespace: Namespace, desk: Desk, expected: dict[str, Any]
) -> None:
    desk.install()
    desk.until_up()
    training = Training(cluster, namespace, TWO)
    training.barriers.close(EARLY)
    run = training.run()
    training.until_barrier(EARLY)
    thief = Intruder(cluster, namespace)

    found = thief.finds(addresses_of(training, desk))
    print(f"without policies: {found}")
    for part, ports in PORTS.items():
        assert ports <= found[part], f"{part}: the intruder's way of knocking is no good"
    head = addresses_of(training, desk)["head"]
    assert thief.runs("python3", "-c", ASK, DASHBOARD.format(head)).strip() in ("401", "403"), "without Ray's token"
    account = f"--as=system:serviceaccount:{namespace.name}:default"
    for verb, what in (("get", "secrets"), ("list", "pods"), ("create", "pods"), ("get", "configmaps")):
        done = cluster.kubectl.tried("auth", "can-i", verb, what, f"--namespace={namespace.name}", account)
        assert done.stdout.strip() == "no", f"with its own token it may {verb} {what}"

    desk.upgrade(networkPolicies={"enabled": True})
    desk.until_up()
    found = thief.finds(addresses_of(training, desk))
    print(f"with policies: {found}")
    assert found == {}

    # Who has to reach them does: KubeRay's operator, Ray's nodes, Dagster's parts, and a run's.
    training.barriers.open()
    assert training.end(run) == 0, training.log()[-5000:]
    assert_equal(training.outcome(), expected)
    with desk.forwarded("webserver", 3000) as ui:
        said = mlpipes(desk, "backfill", "digits", "--scale=w1-b128-e30-g0", f"--ui={ui}")
    assert "w1-b128-e30-g0" in said
