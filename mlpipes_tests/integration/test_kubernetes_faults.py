"""What Kubernetes itself can lose under a training, one by one and all at once: the same bits come out each time.

A fault strikes while the training waits at a barrier, and stays until it has gone on as far as it can without what is gone.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from mlpipes.store.messages import Started, read_messages
from mlpipes_tests.cluster import addons, conftest, queues
from mlpipes_tests.cluster.cluster import Cluster
from mlpipes_tests.cluster.conftest import Namespace
from mlpipes_tests.integration import test_kubernetes
from mlpipes_tests.integration.test_kubernetes import EARLY, LATE, TWO, Training, assert_equal, started
from mlpipes_tests.waiting import until

pytestmark = pytest.mark.cluster
cluster, namespace, expected = conftest.cluster, conftest.namespace, test_kubernetes.expected
AWAY_SECONDS = 60.0
"""So long the API server is away at least."""


class Struck:
    """A training with a fault."""

    def __init__(self, training: Training) -> None:
        self.training, self.cluster = training, training.cluster
        self.began = time.monotonic()

    def node_of(self, role: str) -> str:
        """A node that a pod of a role is on; a worker's is not the head's."""
        (head,) = self.training.pods("head")
        if role == "head":
            return head["spec"]["nodeName"]
        (node,) = {pod["spec"]["nodeName"] for pod in self.training.pods("worker")} - {head["spec"]["nodeName"]}
        return node

    def until_replaced(self, attempt: int = 1) -> None:
        """Wait until other workers train, or those of another attempt."""
        folder, times = self.training.folder(), 2 if attempt == 1 else 1
        self.training.until(lambda: started(folder, attempt, times), "other workers train")

    def go_on(self) -> None:
        """Let it train to its next barrier."""
        self.training.barriers.open(EARLY)
        self.training.until_barrier(LATE)


@contextmanager
def _kubelet(struck: Struck) -> Iterator[None]:
    """The node counts as lost, but its pods run on: they are taken for dead, and must not disturb those in their place."""
    node = struck.node_of("worker")
    struck.cluster.kill_kubelet(node)
    struck.cluster.wait_until_ready(node, ready=False)
    struck.go_on()
    try:
        yield
    finally:
        struck.cluster.start_kubelet(node)
    struck.cluster.wait_until_ready(node)


@contextmanager
def _replaced(
    struck: Struck, role: str, lose: Callable[[str], None], bring: Callable[[str], None], attempt: int = 1
) -> Iterator[None]:
    """A node is lost, and comes back when others train in its place."""
    node = struck.node_of(role)
    lose(node)
    try:
        struck.until_replaced(attempt)
        struck.go_on()
    finally:
        bring(node)
    struck.cluster.wait_until_ready(node)
    yield


def _network(struck: Struck) -> Any:
    return _replaced(struck, "worker", struck.cluster.cut_network, struck.cluster.heal_network)


def _frozen(struck: Struck) -> Any:
    return _replaced(struck, "worker", struck.cluster.freeze_node, struck.cluster.thaw_node)


def _node_of_the_head(struck: Struck) -> Any:
    return _replaced(struck, "head", struck.cluster.kill_node, struck.cluster.start_node, attempt=2)


@contextmanager
def _api_server(struck: Struck) -> Iterator[None]:
    struck.cluster.kill_program("apiserver")
    struck.go_on()
    time.sleep(max(0.0, struck.began + AWAY_SECONDS - time.monotonic()))  # long enough for every client to give up
    struck.cluster.start_program("apiserver")
    struck.cluster.wait_for_api()
    yield


@contextmanager
def _etcd(struck: Struck) -> Iterator[None]:
    struck.cluster.kill_program("etcd")
    struck.go_on()
    struck.cluster.start_program("etcd")
    struck.cluster.wait_for_api()
    yield


@contextmanager
def _controllers(struck: Struck) -> Iterator[None]:
    """Nobody replaces a pod, or finds a node for it, until they are back."""
    for program in ("controllers", "scheduler"):
        struck.cluster.kill_program(program)
    _kill_worker(struck)
    for program in ("controllers", "scheduler"):
        struck.cluster.start_program(program)
    struck.until_replaced()
    struck.go_on()
    yield


@contextmanager
def _operator(struck: Struck) -> Iterator[None]:
    struck.cluster.kill_operator(addons.RAY)
    _kill_worker(struck)
    struck.until_replaced()
    struck.go_on()
    yield


@contextmanager
def _kueue(struck: Struck) -> Iterator[None]:
    struck.cluster.kill_operator(addons.KUEUE)
    struck.go_on()
    yield


def _everything(struck: Struck) -> Any:
    """Both operators, a worker, the control plane and the node of the head at one moment; the node comes back later."""
    programs = ("apiserver", "etcd", "controllers", "scheduler")

    def lose(node: str) -> None:
        for operator in (addons.KUEUE, addons.RAY):
            struck.cluster.kill_operator(operator)
        _kill_worker(struck)
        for program in programs:
            struck.cluster.kill_program(program)
        struck.cluster.kill_node(node)
        for program in reversed(programs):
            struck.cluster.start_program(program)
        struck.cluster.wait_for_api()

    return _replaced(struck, "head", lose, struck.cluster.start_node, attempt=2)


def _kill_worker(struck: Struck) -> None:
    worker = struck.training.pods("worker")[0]["metadata"]["name"]
    where = f"--namespace={struck.training.namespace.name}"
    struck.cluster.kubectl("delete", "pod", worker, where, "--grace-period=0", "--force")


FAULTS: dict[str, Callable[[Struck], Any]] = {
    "kubelet": _kubelet,
    "network": _network,
    "frozen node": _frozen,
    "node of the head": _node_of_the_head,
    "API server": _api_server,
    "etcd": _etcd,
    "controllers": _controllers,
    "KubeRay": _operator,
    "Kueue": _kueue,
    "everything": _everything,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_the_cluster_loses_the_same_model_comes_out(
    cluster: Cluster, namespace: Namespace, expected: dict[str, Any], fault: str
) -> None:
    queue = {"queue": queues.NAME} if fault == "Kueue" else {}
    with ExitStack() as afterwards:
        if queue:
            cluster.kubectl.apply(queues.queue(namespace.name, {"cpu": "2", "memory": "32Gi"}))
            afterwards.callback(cluster.kubectl, "delete", *queues.of_cluster(namespace.name), "--wait=false")
        training = Training(cluster, namespace, TWO, placement="spread", **queue)
        training.barriers.close(EARLY, LATE)
        run = training.run()
        training.until_barrier(EARLY)
        struck = Struck(training)
        with FAULTS[fault](struck):
            training.barriers.open()
            assert training.end(run) == 0, training.log()[-5000:]
            assert_equal(training.outcome(), expected)
        training.assert_nothing_is_left()
    print(f"{fault}: {_next_workers(training, struck):.0f} s to the next workers' start (0: the same trained on)")
    for operator in cluster.operators:
        addons.wait_for_operator(cluster.kubectl, operator)
    until(lambda: not cluster.died(), "all programs run")


def _next_workers(training: Training, struck: Struck) -> float:
    """Seconds from the fault to the first workers that started after it; 0 where none did."""
    wall = time.time() - (time.monotonic() - struck.began)
    attempts = range(1, training.outcome()["attempt"] + 1)
    found = [
        message.time - wall
        for attempt in attempts
        for message in read_messages(training.folder().messages(attempt))[0]
        if isinstance(message, Started) and message.time > wall
    ]
    return min(found, default=0.0)
