"""Faults of a cluster under a training: each strikes where it is entered, and is mended where it is left.

They are context managers whose value is the Unix time at which the fault is there, or was noticed: a node counts as lost
some time after its last word only, and what a queue has taken away is of use again when the other job is done.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from typing import Protocol

from mlpipes_tests.cluster import addons, queues
from mlpipes_tests.cluster.cluster import Cluster
from mlpipes_tests.cluster.conftest import Namespace
from mlpipes_tests.cluster.kubectl import Manifest
from mlpipes_tests.waiting import until

AWAY_SECONDS = 60.0
"""So long the API server is away at least: enough for every client to give up."""
_NOW = ("--grace-period=0", "--force")
_PROGRAMS = ("apiserver", "etcd", "controllers", "scheduler")


class Target(Protocol):
    """A training on a cluster."""

    cluster: Cluster
    namespace: Namespace

    def pods(self, role: str) -> list[Manifest]:
        """Its pods of a role (`head`, `worker`) that are not being deleted."""
        ...


Fault = Callable[[Target], AbstractContextManager[float]]


def node_of(target: Target, role: str) -> str:
    """A node that a pod of a role is on; a worker's is not the head's, if there is another one."""
    nodes = {role: {pod["spec"]["nodeName"] for pod in target.pods(role)} for role in ("head", "worker")}
    if role == "worker":
        return sorted(nodes["worker"] - nodes["head"] or nodes["worker"])[0]
    return sorted(nodes["head"])[0]


def delete(target: Target, pods: list[Manifest], *how: str) -> None:
    """Delete pods of the training's namespace; nothing if there are none."""
    if names := [pod["metadata"]["name"] for pod in pods]:
        where = f"--namespace={target.namespace.name}"
        target.cluster.kubectl("delete", "pod", *names, where, "--ignore-not-found", *how)


def _pod(role: str) -> Fault:
    @contextmanager
    def lost(target: Target) -> Iterator[float]:
        delete(target, target.pods(role)[:1], *_NOW)
        yield time.time()

    return lost


def _node(role: str, lose: Callable[[Cluster, str], None], bring: Callable[[Cluster, str], None]) -> Fault:
    @contextmanager
    def lost(target: Target) -> Iterator[float]:
        node = node_of(target, role)
        lose(target.cluster, node)
        try:
            target.cluster.wait_until_ready(node, ready=False)
            yield time.time()
        finally:
            bring(target.cluster, node)
        target.cluster.wait_until_ready(node)

    return lost


@contextmanager
def _drain(target: Target) -> Iterator[float]:
    node = node_of(target, "worker")
    try:
        target.cluster.kubectl(
            *("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=280s")
        )
        yield time.time()
    finally:
        target.cluster.kubectl("uncordon", node)


@contextmanager
def _preemption(target: Target) -> Iterator[float]:
    name, where = "urgent", f"--namespace={target.namespace.name}"
    kubectl = target.cluster.kubectl
    kubectl.apply([queues.priority("urgent", 1000), queues.urgent_job(target.namespace.name)])
    try:
        kubectl.wait_for("job", name, lambda job: job["status"].get("ready"), "runs", namespace=target.namespace.name)
    finally:
        kubectl("delete", "job", name, where)
    yield time.time()


@contextmanager
def _api_server(target: Target) -> Iterator[float]:
    struck = time.time()
    target.cluster.kill_program("apiserver")
    try:
        yield struck
    finally:
        time.sleep(max(0.0, struck + AWAY_SECONDS - time.time()))
        target.cluster.start_program("apiserver")
        target.cluster.wait_for_api()


@contextmanager
def _etcd(target: Target) -> Iterator[float]:
    target.cluster.kill_program("etcd")
    try:
        yield time.time()
    finally:
        target.cluster.start_program("etcd")
        target.cluster.wait_for_api()


@contextmanager
def _controllers(target: Target) -> Iterator[float]:
    """Nobody replaces a pod, or finds a node for it, until they are back."""
    for program in ("controllers", "scheduler"):
        target.cluster.kill_program(program)
    delete(target, target.pods("worker")[:1], *_NOW)
    for program in ("controllers", "scheduler"):
        target.cluster.start_program(program)
    yield time.time()


def _operator(*names: str, worker: bool) -> Fault:
    """Operators are killed, and perhaps a worker whom they would replace."""

    @contextmanager
    def lost(target: Target) -> Iterator[float]:
        for name in names:
            target.cluster.kill_operator(name)
        if worker:
            delete(target, target.pods("worker")[:1], *_NOW)
        yield time.time()
        for name in names:
            addons.wait_for_operator(target.cluster.kubectl, name)

    return lost


@contextmanager
def _everything(target: Target) -> Iterator[float]:
    """Both operators, a worker, the control plane and the node of the head at one moment; the node comes back later."""
    cluster, node = target.cluster, node_of(target, "head")
    for operator in cluster.operators:
        cluster.kill_operator(operator)
    delete(target, target.pods("worker")[:1], *_NOW)
    for program in _PROGRAMS:
        cluster.kill_program(program)
    cluster.kill_node(node)
    for program in reversed(_PROGRAMS):
        cluster.start_program(program)
    cluster.wait_for_api()
    try:
        yield time.time()
    finally:
        cluster.start_node(node)
    cluster.wait_until_ready(node)
    for operator in cluster.operators:
        addons.wait_for_operator(cluster.kubectl, operator)


FAULTS: dict[str, Fault] = {
    "worker pod": _pod("worker"),
    "head pod": _pod("head"),
    "node of a worker": _node("worker", Cluster.kill_node, Cluster.start_node),
    "node of the head": _node("head", Cluster.kill_node, Cluster.start_node),
    "network of a node": _node("worker", Cluster.cut_network, Cluster.heal_network),
    "frozen node": _node("worker", Cluster.freeze_node, Cluster.thaw_node),
    "kubelet": _node("worker", Cluster.kill_kubelet, Cluster.start_kubelet),
    "drain": _drain,
    "preemption": _preemption,
    "API server": _api_server,
    "etcd": _etcd,
    "controllers": _controllers,
    "KubeRay": _operator(addons.RAY, worker=True),
    "Kueue": _operator(addons.KUEUE, worker=False),
    "everything": _everything,
}
"""What a training can lose on a cluster; preemption and Kueue are for one that waits in a queue."""


def until_at_rest(cluster: Cluster) -> None:
    """Wait until everything that a fault has ended runs again, and operators have taken up their work."""
    began = datetime.now(UTC)
    for operator in cluster.operators:
        addons.wait_for_operator(cluster.kubectl, operator)
        _, namespace = addons.OPERATORS[operator]

        def leads(namespace: str = namespace) -> bool:
            leases = cluster.kubectl.objects("leases", namespace)
            return all(datetime.fromisoformat(lease["spec"]["renewTime"]) > began for lease in leases)

        until(leads, f"{operator} leads again", every=1)
    until(lambda: not cluster.died(), "all programs run")
