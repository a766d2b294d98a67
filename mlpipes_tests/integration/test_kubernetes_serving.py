"""Models served by the chart on a real Kubernetes: what is changed, moved or killed under load costs no request.

But those, of course, that were being answered by what was killed; a client that asks again is answered.
"""

import base64
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import requests

from mlpipes.tracking.runs import Tracker
from mlpipes_tests.cluster import addons, conftest
from mlpipes_tests.cluster.chart import RELEASE, Desk
from mlpipes_tests.cluster.cluster import Cluster, kubernetes_cluster
from mlpipes_tests.cluster.conftest import Namespace
from mlpipes_tests.cluster.kubectl import Manifest, has_condition
from mlpipes_tests.integration import test_kubernetes_chart
from mlpipes_tests.serving.clients import Clients, Counts
from mlpipes_tests.serving.models import NAME, champion, registered
from mlpipes_tests.waiting import LIMIT_SECONDS, until

pytestmark = pytest.mark.cluster
namespace, desk, programs = conftest.namespace, test_kubernetes_chart.desk, test_kubernetes_chart.programs
PART = "serve-digits"
SERVED = f"{RELEASE}-{PART}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes and a control plane, with metrics-server and without what trainings need."""
    with kubernetes_cluster(tmp_path_factory.mktemp("k8s"), operators=[addons.METRICS]) as started:
        yield started


class Served:
    """The chart's served model, as its users and its cluster see it."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.kubectl, self.where = desk, desk.kubectl, desk.namespace.name
        self.settings: dict[str, Any] = {
            "replicas": 2,
            "maxReplicas": 2,
            "options": ["--poll", "0.5"],
            "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "4Gi"}},
        }

    def change(self, **settings: Any) -> None:
        """Upgrade the chart with other settings of this model."""
        self.settings |= settings
        self.desk.upgrade(serve={"models": {"digits": self.settings}})

    def pods(self) -> list[Manifest]:
        """Its pods that answer and are not told to go."""
        return [pod for pod in self.desk.pods(PART) if has_condition("Ready")(pod)]

    def names(self) -> set[str]:
        """Of those pods."""
        return {pod["metadata"]["name"] for pod in self.pods()}

    def until_pods(self, number: int, without: set[str], clients: Clients | None = None) -> None:
        """Wait until so many answer, and nothing else of it is left on nodes that live, above all none of those."""

        def settled() -> bool:
            answering = self.names()
            left = {
                pod["metadata"]["name"]
                for pod in self.kubectl.objects("pods", self.where, selector=f"mlpipes.io/part={PART}")
            }
            return len(answering) == number and not (left & without) and left == answering

        def vain() -> str:
            return self.desk.cluster.died() or (clients.failed() if clients else "")

        until(settled, f"{number} pods answer, and none of {sorted(without)}", vain=vain, every=1)

    def headers(self) -> dict[str, str]:
        """What lets a client in."""
        secret = self.kubectl.find("secret", f"{RELEASE}-serve", self.where)
        assert secret is not None
        return {"authorization": f"Bearer {base64.b64decode(secret['data']['token']).decode()}"}

    def address(self) -> str:
        """Of its Service, which this host reaches through the control node's kube-proxy."""
        service = self.kubectl.find("service", SERVED, self.where)
        assert service is not None
        return f"http://{service['spec']['clusterIP']}:8100"

    def versions(self) -> set[str]:
        """Which version each pod answers with."""
        found = set()
        for pod in self.pods():
            asked = f"http://{pod['status']['podIP']}:8100/v2/models/{NAME}"
            found |= set(requests.get(asked, headers=self.headers(), timeout=LIMIT_SECONDS).json()["versions"])
        return found

    def cold_start(self, pod: Manifest) -> str:
        """How long a pod's start took, by its parts. Kubernetes says whole seconds."""
        times = {each["type"]: each["lastTransitionTime"] for each in pod["status"]["conditions"]}
        lines = self.kubectl.logs(pod["metadata"]["name"], "--timestamps", namespace=self.where).splitlines()
        moments = {
            "scheduled": times["PodScheduled"],
            "container started": pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"],
            "program imported": next(line.split()[0] for line in lines if "will answer on" in line),
            "model fetched, loaded and tried": next(line.split()[0] for line in lines if "is served, after" in line),
            "ready": times["Ready"],
        }
        said, before = [], _moment(pod["metadata"]["creationTimestamp"])
        for part, text in moments.items():
            said.append(f"{part} {(_moment(text) - before).total_seconds():.1f} s")
            before = _moment(text)
        return ", ".join(said)


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def nothing_was_lost(clients: Clients, what: str) -> Counts:
    counts = clients.counted()
    print(f"{what}: {dict(counts.answers)}, {len(counts.lost)} lost, {len(counts.unreached)} unreached")
    assert not clients.failures, clients.failed()
    assert not counts.lost + counts.unreached, counts
    return counts


def nothing_was_lost_but_ways_to_the_dead(clients: Clients, what: str, cluster: Cluster, dead: set[str]) -> Counts:
    """A new connection from a port that one to a dead pod had is sent after it by kube-proxy; it asks nothing of anybody."""
    remembered = cluster.remembered(dead)
    counts = clients.counted()
    print(f"{what}: {dict(counts.answers)}, unreached {counts.unreached}, {len(remembered)} ports lead to the dead")
    assert not clients.failures, clients.failed()
    assert not counts.lost, counts
    assert len(counts.unreached) <= len(remembered), counts
    return counts


def only_what_was_in_flight_was_lost(clients: Clients, what: str) -> None:
    counts = clients.counted()
    print(f"{what}: {dict(counts.answers)}, {len(counts.lost)} lost, {len(counts.unreached)} unreached")
    assert not clients.failures, clients.failed()
    assert len(counts.lost) <= clients.number, counts.lost


def test_under_load_nothing_that_is_done_to_it_costs_a_request(
    cluster: Cluster, namespace: Namespace, desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLPIPES_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    kubectl, served = cluster.kubectl, Served(desk)
    desk.install()
    desk.until_up()

    def move(version: str) -> None:
        with desk.forwarded("mlflow", 5000) as uri:
            champion(Tracker(uri), version)
        until(lambda: served.versions() == {version}, f"all serve version {version}", vain=cluster.died, every=1)

    with desk.forwarded("mlflow", 5000) as uri:
        versions = dict(registered(Tracker(uri), seed) for seed in (1, 2))
        champion(Tracker(uri), "1")
    served.change()
    served.until_pods(2, set())
    for pod in served.pods():
        print(f"cold start of {pod['metadata']['name']}: {served.cold_start(pod)}")
    assert {pod["spec"]["nodeName"] for pod in served.pods()} == {"node-1", "node-2"}
    address = served.address()
    assert requests.get(f"{address}/metrics", timeout=LIMIT_SECONDS).status_code == 401
    assert requests.get(f"{address}/metrics", headers=served.headers(), timeout=LIMIT_SECONDS).status_code == 200

    with Clients(address, served.headers(), versions) as clients:
        for version in ("2", "1", "2"):
            move(version)
        assert set(nothing_was_lost(clients, "alias moved three times").answers) == {"1", "2"}
        assert set(nothing_was_lost(clients, "afterwards").answers) == {"2"}

        (leaving,) = [each["metadata"]["name"] for each in served.pods() if each["spec"]["nodeName"] == "node-1"]
        kubectl("drain", "node-1", f"--pod-selector=mlpipes.io/part={PART}", "--delete-emptydir-data")
        served.until_pods(2, {leaving}, clients)
        kubectl("uncordon", "node-1")
        nothing_was_lost(clients, "node drained")

        before = served.names()
        served.change(options=["--poll", "1"])
        served.until_pods(2, before, clients)
        nothing_was_lost(clients, "rolling update")
        assert {pod["spec"]["nodeName"] for pod in served.pods()} == {"node-1", "node-2"}

        killed = min(served.names())
        kubectl("delete", "pod", killed, f"--namespace={namespace.name}", "--grace-period=0", "--force")
        served.until_pods(2, {killed}, clients)
        only_what_was_in_flight_was_lost(clients, "pod killed")

        served.change(maxReplicas=3, cpuPercent=5)
        served.until_pods(3, set(), clients)
        nothing_was_lost(clients, "scaled by its CPU")

        # With its node, the database of MLflow goes: who starts elsewhere serves what was served last.
        (database,) = desk.pods("postgres")
        node = database["spec"]["nodeName"]
        there = {pod["metadata"]["name"] for pod in served.pods() if pod["spec"]["nodeName"] == node}
        dead = {pod["status"]["podIP"] for pod in served.pods() if pod["metadata"]["name"] in there}
        assert there
        cluster.kill_node(node)
        try:
            until(
                lambda: len(served.names() - there) == 3,
                "three pods answer on the other node",
                vain=clients.failed,
                every=1,
            )
            only_what_was_in_flight_was_lost(clients, "node killed")
            afterwards = nothing_was_lost_but_ways_to_the_dead(clients, "afterwards", cluster, dead)
            assert set(afterwards.answers) == {"2"}
        finally:
            cluster.start_node(node)
        cluster.wait_until_ready(node)
        desk.until_up()
        move("1")
        nothing_was_lost_but_ways_to_the_dead(clients, "node back", cluster, dead)
