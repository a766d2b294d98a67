"""What the cluster says of a job, in words and a state; which pods' nodes are silent."""

import re

import pytest

from mlpipes.compute.jobs import JobState
from mlpipes.compute.kubernetes_entry import UNUSABLE_VOLUME
from mlpipes.compute.kubernetes_reasons import Look, quantity, silent_nodes, standing
from mlpipes_tests.compute.kubernetes_objects import (
    forbids,
    job,
    pod,
    waiting,
    workload,
)

HEAD, UP = pod("head"), ("Running", "RUNNING")
UNPLACED = {
    "type": "PodScheduled",
    "status": "False",
    "reason": "Unschedulable",
    "message": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu.",
}
NODES = [{"status": {"allocatable": {"nvidia.com/gpu": "2", "memory": "64Gi"}}}]
OOM = {"lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}
BACK = {"type": "Evicted", "status": "True", "reason": "Preempted", "message": "Preempted to accommodate a workload"}


@pytest.mark.parametrize(
    ("look", "state", "said"),
    [
        (Look(job()), JobState.PENDING, "operator makes its pods"),
        (Look(job("Initializing"), [HEAD, pod(ready=False)]), JobState.PENDING, "1 of 2 pods are ready"),
        (Look(job("Running", ""), [HEAD, pod()]), JobState.PENDING, "operator starts the driver"),
        (Look(job(*UP), [HEAD, pod()]), JobState.RUNNING, "^$"),
        (Look(job("Complete", "SUCCEEDED")), JobState.SUCCEEDED, "^$"),
        (Look(job("Failed", "FAILED", reason="AppFailed", message="exit 1")), JobState.FAILED, "^AppFailed exit 1$"),
        (
            Look(job("Failed", "FAILED", reason="AppFailed", message=f"exit 5:\nruns\n{UNUSABLE_VOLUME}/x: no\n")),
            JobState.REFUSED,
            "^unusable volume: /x: no$",
        ),
        (Look(job("ValidationFailed", message="too long")), JobState.REFUSED, "KubeRay refuses it: too long"),
        (Look(job(*UP) | {"metadata": {"deletionTimestamp": "t"}}), JobState.STOPPED, "somebody has deleted it"),
        # A head that is gone reads RUNNING for ever.
        (Look(job(*UP), [pod()]), JobState.PENDING, "the head pod is gone"),
        (Look(job(*UP), [pod("head", ready=False), pod()]), JobState.PENDING, "the head pod is not ready"),
        (Look(job(*UP), [HEAD]), JobState.PENDING, "0 of 1 worker pods are ready"),
        (Look(job(*UP), [HEAD, pod()], dead=["w-1"]), JobState.PENDING, "a node does not answer; its pods w-1"),
        # Images.
        (
            Look(job("Initializing"), [pod(ready=False, container=waiting("ErrImagePull", "manifest unknown"))]),
            JobState.REFUSED,
            "image cannot be pulled: registry/x:1: manifest unknown",
        ),
        (
            Look(job("Initializing"), [pod(ready=False, container=waiting("ErrImagePull", "i/o timeout"))]),
            JobState.PENDING,
            "image cannot be pulled: registry/x:1: i/o timeout",
        ),
        (
            Look(
                job("Initializing"),
                [pod(ready=False, container=waiting("ImagePullBackOff", 'Back-off pulling image "x"'))],
                events=[{"message": "Failed to pull image x: not found"}],
            ),
            JobState.REFUSED,
            "image cannot be pulled: registry/x:1: Failed to pull image x: not found",
        ),
        (
            Look(job("Initializing"), [pod(container=waiting("CreateContainerConfigError", 'secret "s" not found'))]),
            JobState.REFUSED,
            'a container cannot be made: secret "s" not found',
        ),
        (
            Look(
                job("Initializing"),
                [pod(container=waiting("CreateContainerConfigError", "failed to sync secret cache"))],
            ),
            JobState.PENDING,
            "a container cannot be made: failed to sync secret cache",
        ),
        # Pods that a namespace does not let in.
        (
            Look(
                job("Initializing"), [HEAD], events=[forbids('violates PodSecurity "restricted:latest": hostNetwork')]
            ),
            JobState.REFUSED,
            '^its pods are forbidden: violates PodSecurity "restricted:latest": hostNetwork$',
        ),
        (
            Look(job("Initializing"), [HEAD], events=[forbids("exceeded quota: team, requested: cpu=4")]),
            JobState.PENDING,
            "^its pods are forbidden: exceeded quota: team",
        ),
        (
            Look(job("Initializing"), [HEAD, pod(ready=False)], events=[forbids("violates PodSecurity")]),
            JobState.PENDING,
            "1 of 2 pods are ready",
        ),
        (Look(job("Initializing"), [HEAD]), JobState.PENDING, "1 of 2 pods are ready"),
        # Nodes.
        (
            Look(job("Initializing"), [HEAD, pod(ready=False, conditions=[UNPLACED])], nodes=NODES),
            JobState.PENDING,
            "no node fits: 4 GPUs wanted, largest has 2",
        ),
        (
            Look(job("Initializing"), [HEAD, pod(ready=False, conditions=[UNPLACED])]),
            JobState.PENDING,
            "no node has room now: 0/2 nodes are available",
        ),
        # Memory.
        (
            Look(job(*UP), [HEAD, pod(container=OOM)]),
            JobState.RUNNING,
            "^worker-x was OOMKilled at 4Gi: raise memory .`memory_per_worker`.$",
        ),
        (
            Look(job(*UP), [HEAD, pod(ready=False, container=OOM | waiting("CrashLoopBackOff"))]),
            JobState.PENDING,
            "ends again and again: worker-x was OOMKilled at 4Gi",
        ),
        # Queues.
        (Look(job(suspend=True)), JobState.PENDING, "waits for Kueue to queue it in training"),
        (
            Look(job(suspend=True), workload=workload(5), ahead=3),
            JobState.PENDING,
            r"^waits for quota in queue training: 3 ahead \(1 more needed\)$",
        ),
        (
            Look(job("Suspended", suspend=True), workload=workload(conditions=[BACK])),
            JobState.PENDING,
            "was put back .Preempted to accommodate a workload., and waits for quota",
        ),
        (
            Look(job("Suspending", suspend=True), workload=workload(0, {"status": "True"}, conditions=[BACK])),
            JobState.PENDING,
            "is put back into queue training: Preempted",
        ),
        (
            Look(
                job(suspend=True),
                workload=workload(0, {"reason": "Inadmissible", "message": "LocalQueue x doesn't exist"}),
            ),
            JobState.REFUSED,
            "LocalQueue x doesn't exist",
        ),
        (
            Look(
                job(suspend=True),
                workload=workload(0, {"reason": "Inadmissible", "message": "ClusterQueue c is stopped"}),
            ),
            JobState.REFUSED,
            "ClusterQueue c is stopped",
        ),
        (Look(job(suspend=True), workload=workload(active=False)), JobState.REFUSED, "Kueue has deactivated it"),
    ],
)
def test_what_the_cluster_says_of_a_job(look: Look, state: JobState, said: str) -> None:
    found = standing(look)
    assert found.state == state, found
    assert re.search(said, found.reason), found.reason


@pytest.mark.parametrize(
    ("ready", "containers", "is_silent"),
    [
        ("Unknown", "True", True),
        ("False", "True", True),  # the node's controller says so, not the kubelet
        ("False", "False", False),  # the kubelet does: it ends the pod
        ("True", "True", False),
    ],
)
def test_pods_of_a_silent_node_are_known(ready: str, containers: str, is_silent: bool) -> None:
    found = pod()
    found["status"]["conditions"] = [
        {"type": "Ready", "status": ready},
        {"type": "ContainersReady", "status": containers},
    ]
    assert not list(silent_nodes([found])), "it is not being deleted, and may come back"
    found["metadata"]["deletionTimestamp"] = "t"
    assert list(silent_nodes([found, HEAD])) == ["worker-x"] * is_silent


@pytest.mark.parametrize(("text", "number"), [("500m", 0.5), ("2", 2), ("4Gi", 2**32), ("1.5k", 1500), ("1e3", 1000)])
def test_quantities_are_numbers(text: str, number: float) -> None:
    assert quantity(text) == number


def test_what_is_no_quantity_is_an_error() -> None:
    with pytest.raises(ValueError, match="no quantity"):
        quantity("many")
