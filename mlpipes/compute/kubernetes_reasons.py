"""Reasons: how a RayJob stands and why, from what the API server knows of it, in words that say what to do.

Nothing here asks anybody: all of it is translation of plain data.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlpipes.compute.jobs import JobState, JobStatus
from mlpipes.compute.kubernetes_entry import UNUSABLE_VOLUME

Thing = Mapping[str, Any]
DELETED = "somebody has deleted it in Kubernetes"
_NO_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
_NO_CONTAINER = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
_NEVER_AN_IMAGE = ("not found", "manifest unknown", "denied", "unauthorized", "InvalidImageName", "ErrImageNeverPull")
_NEVER_ADMITTED = ("doesn't exist", "is inactive", "is stopped", "terminating or missing")
_NEVER_SET_UP = ("not found", "non-root", "couldn't find key")
"""In the kubelet's reason for not making a container: what does not pass by itself."""


@dataclass(frozen=True)
class Look:
    """What was seen of a RayJob at one time."""

    job: Thing
    pods: Sequence[Thing] = ()
    workload: Thing | None = None
    """Kueue's."""
    ahead: int | None = None
    """How many of its queue are to be admitted before it, where that is known."""
    nodes: Sequence[Thing] = ()
    """Empty where we may not see them."""
    events: Sequence[Thing] = ()
    """Warnings about the RayJob and its pods, the latest last."""
    gpu_resource: str = "nvidia.com/gpu"
    dead: Sequence[str] = field(default=())
    """Pods that a silent node holds."""


def standing(look: Look) -> JobStatus:
    """How a RayJob stands. What waits is PENDING with the reason, and REFUSED if it can never start as it is."""
    status = look.job.get("status") or {}
    deployed, ray = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    if look.job["metadata"].get("deletionTimestamp"):
        return JobStatus(JobState.STOPPED, DELETED)
    if deployed == "ValidationFailed":
        return JobStatus(JobState.REFUSED, f"KubeRay refuses it: {status.get('message', '')}")
    if deployed in ("Complete", "Failed"):
        if unusable := [line for line in _failure(status).splitlines() if line.startswith(UNUSABLE_VOLUME)]:
            return JobStatus(JobState.REFUSED, unusable[-1])  # as it would be again
        state = JobState.SUCCEEDED if ray == "SUCCEEDED" else JobState.FAILED
        return JobStatus(state, "; ".join(filter(None, [*out_of_memory(look.pods), _failure(status)])))
    if look.job["spec"].get("suspend") or deployed in ("Suspending", "Suspended"):
        return queueing(look)
    if why := forbidden(look) or next(blocked(look), None):
        return why
    if deployed != "Running" or ray not in ("RUNNING", "SUCCEEDED", "FAILED", "STOPPED"):
        return JobStatus(JobState.PENDING, _starting(look))
    return JobStatus(JobState.RUNNING, "; ".join(out_of_memory(look.pods)))


def _failure(status: Thing) -> str:
    return " ".join(str(status[name]) for name in ("reason", "message") if status.get(name))


# -- queues --------------------------------------------------------------------------------------------------------
def queueing(look: Look) -> JobStatus:
    """Why a suspended job waits."""
    queue = (look.job["metadata"].get("labels") or {}).get("kueue.x-k8s.io/queue-name", "")
    if look.workload is None:
        said = _last(look.events)
        return JobStatus(JobState.PENDING, f"waits for Kueue to queue it in {queue}{f': {said}' if said else ''}")
    conditions = conditions_of(look.workload)
    if look.workload["spec"].get("active") is False:
        why = conditions.get("DeactivationTarget") or conditions.get("Evicted") or {}
        return JobStatus(JobState.REFUSED, f"Kueue has deactivated it: {why.get('message', 'by somebody')}")
    reserved, evicted = conditions.get("QuotaReserved", {}), conditions.get("Evicted", {})
    said = str(reserved.get("message", ""))
    if reserved.get("reason") == "Inadmissible" and any(word in said for word in _NEVER_ADMITTED):
        return JobStatus(JobState.REFUSED, f"it cannot be admitted: {said}")
    if evicted.get("status") == "True" and reserved.get("status") == "True":
        return JobStatus(JobState.PENDING, f"is put back into queue {queue}: {evicted.get('message', '')}")
    if reserved.get("status") == "True":
        return JobStatus(JobState.PENDING, f"queue {queue} has admitted it")
    before = f"was put back ({evicted.get('message', '')}), and " if evicted.get("status") == "True" else ""
    more = f" ({said})" if said else ""
    return JobStatus(
        JobState.PENDING,
        f"{before}waits for quota in queue {queue}{'' if look.ahead is None else f': {look.ahead} ahead'}{more}",
    )


# -- pods ----------------------------------------------------------------------------------------------------------
def forbidden(look: Look) -> JobStatus | None:
    """Why pods are not even made: their namespace does not let them in as they are, or its ResourceQuota is used up."""
    if len(look.pods) > _wanted(look.job):
        return None
    told = [
        event for event in look.events if str(event.get("reason", "")).endswith("Pod") and "forbidden" in _said(event)
    ]
    if not told:
        return None
    state = JobState.PENDING if "exceeded quota" in _said(told[-1]) else JobState.REFUSED
    return JobStatus(state, f"its pods are forbidden: {_said(told[-1]).partition('forbidden: ')[2]}")


def blocked(look: Look) -> Iterator[JobStatus]:
    """What keeps pods from running, the gravest first."""
    if look.dead:
        text = f"a node does not answer; its pods {', '.join(look.dead)} are removed"
        yield JobStatus(JobState.PENDING, text)
    for pod in look.pods:
        for container in _containers(pod):
            waiting = (container.get("state") or {}).get("waiting") or {}
            reason, said = waiting.get("reason", ""), waiting.get("message", "")
            if reason in _NO_IMAGE:
                never = any(word in f"{reason} {said}" for word in _NEVER_AN_IMAGE)
                # While it backs off, the kubelet does not say why; an event of the pod does.
                said = said if "Back-off" not in said else _last(look.events, "Failed to pull") or said
                never |= any(word in said for word in _NEVER_AN_IMAGE)
                text = f"image cannot be pulled: {container.get('image', '')}: {said or reason}"
                yield JobStatus(JobState.REFUSED if never else JobState.PENDING, text)
            elif reason in _NO_CONTAINER:
                state = JobState.REFUSED if any(word in said for word in _NEVER_SET_UP) else JobState.PENDING
                yield JobStatus(state, f"a container cannot be made: {said or reason}")
            elif reason == "CrashLoopBackOff":
                ended = (container.get("lastState") or {}).get("terminated") or {}
                cause = (
                    next(out_of_memory([pod]), "") or f"exit code {ended.get('exitCode')} {ended.get('message', '')}"
                )
                yield JobStatus(JobState.PENDING, f"{pod['metadata']['name']} ends again and again: {cause.strip()}")
    for pod in look.pods:
        condition = conditions_of(pod).get("PodScheduled", {})
        if condition.get("status") == "False" and condition.get("reason") == "Unschedulable":
            yield JobStatus(JobState.PENDING, unplaced(pod, look, str(condition.get("message", ""))))
    head = [pod for pod in look.pods if _role(pod) == "head"]
    if _was_up(look.job) and not any(_is_ready(pod) for pod in head):
        gone = "is not ready" if head else "is gone, and KubeRay's operator makes a new one"
        yield JobStatus(JobState.PENDING, f"the head pod {gone}{_because(look)}")
    workers = [pod for pod in look.pods if _role(pod) == "worker" and _is_ready(pod)]
    if _was_up(look.job) and len(workers) < (wanted := _wanted(look.job)):
        text = f"{len(workers)} of {wanted} worker pods are ready{_because(look)}"
        yield JobStatus(JobState.PENDING, text)


def unplaced(pod: Thing, look: Look, said: str) -> str:
    """Why no node takes a pod: by comparison with the largest, where nodes may be seen, else in the scheduler's words."""
    wanted: dict[str, float] = {}
    for container in pod["spec"]["containers"]:
        for name, amount in ((container.get("resources") or {}).get("requests") or {}).items():
            wanted[name] = wanted.get(name, 0) + quantity(amount)
    for name, amount in wanted.items():
        offers = [quantity((node.get("status") or {}).get("allocatable", {}).get(name, "0")) for node in look.nodes]
        if offers and max(offers) < amount:
            what = {"cpu": "CPUs", look.gpu_resource: "GPUs"}.get(name)
            if what:
                return f"no node fits: {amount:g} {what} wanted, largest has {max(offers):g}"
            return f"no node fits: {amount / 2**30:.3g} Gi of {name} wanted, largest has {max(offers) / 2**30:.3g} Gi"
    return f"no node has room now: {said}"


def out_of_memory(pods: Sequence[Thing]) -> Iterator[str]:
    """Of each pod whose container was killed for want of memory, how much it had."""
    for pod in pods:
        for container in _containers(pod):
            for state in (container.get("state") or {}, container.get("lastState") or {}):
                if (state.get("terminated") or {}).get("reason") == "OOMKilled":
                    limit = _limit(pod, container.get("name", ""))
                    key = "head_memory" if _role(pod) == "head" else "memory_per_worker"
                    yield f"{pod['metadata']['name']} was OOMKilled at {limit}: raise memory (`{key}`)"
                    break


def terminating(pods: Sequence[Thing]) -> Iterator[tuple[str, float]]:
    """Pods that are being deleted, and the seconds of grace that they have."""
    for pod in pods:
        if pod["metadata"].get("deletionTimestamp"):
            yield pod["metadata"]["name"], float(pod["metadata"].get("deletionGracePeriodSeconds") or 0)


def silent_nodes(pods: Sequence[Thing]) -> Iterator[str]:
    """Pods that are being deleted and whose node does not answer, so that it never ends them.

    The node's controller has taken their readiness from them, and the kubelet has not said that a container is not ready.
    """
    for pod in pods:
        ready, containers = (conditions_of(pod).get(name, {}).get("status") for name in ("Ready", "ContainersReady"))
        if pod["metadata"].get("deletionTimestamp") and (
            ready == "Unknown" or (ready, containers) == ("False", "True")
        ):
            yield pod["metadata"]["name"]


def _starting(look: Look) -> str:
    if not look.pods:
        return f"KubeRay's operator makes its pods{_because(look)}"
    ready, all_of_them = [pod for pod in look.pods if _is_ready(pod)], 1 + _wanted(look.job)
    if len(ready) < all_of_them:
        return f"{len(ready)} of {all_of_them} pods are ready{_because(look)}"
    return (
        "its pods are ready; KubeRay's operator starts the driver (if that lasts: does a network policy keep it from port "
        "8265 of the head?)"
    )


def _because(look: Look) -> str:
    said = _last(look.events)
    return f" ({said})" if said else ""


def _last(events: Sequence[Thing], containing: str = "") -> str:
    told = [_said(event) for event in events if containing in _said(event)]
    return told[-1][:400] if told else ""


def _said(event: Thing) -> str:
    return " ".join(str(event.get("message", "")).split())


def _was_up(job: Thing) -> bool:
    """Whether the driver was started once: from then on, missing pods are lost ones."""
    return (job.get("status") or {}).get("jobStatus", "") in ("RUNNING", "FAILED", "STOPPED")


def _wanted(job: Thing) -> int:
    return sum(int(group.get("replicas", 0)) for group in job["spec"]["rayClusterSpec"].get("workerGroupSpecs", []))


def _role(pod: Thing) -> str:
    return (pod["metadata"].get("labels") or {}).get("ray.io/node-type", "")


def _is_ready(pod: Thing) -> bool:
    return conditions_of(pod).get("Ready", {}).get("status") == "True" and not pod["metadata"].get("deletionTimestamp")


def _containers(pod: Thing) -> list[Thing]:
    status = pod.get("status") or {}
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def _limit(pod: Thing, container: str) -> str:
    for found in pod["spec"]["containers"]:
        if found["name"] == container:
            return ((found.get("resources") or {}).get("limits") or {}).get("memory", "its limit")
    return "its limit"


def conditions_of(thing: Thing) -> dict[str, Thing]:
    """The conditions of a thing, by their type."""
    return {condition["type"]: condition for condition in (thing.get("status") or {}).get("conditions", [])}


_UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15} | {
    f"{letter}i": 1024.0**power for power, letter in enumerate("KMGTP", start=1)
}


def quantity(text: Any) -> float:
    """The number that a quantity of Kubernetes means: `500m` is 0.5, `4Gi` is 2³². Raises ValueError for none."""
    match = re.fullmatch(r"([+-]?[\d.]+(?:[eE][+-]?\d+)?)([A-Za-z]*)", str(text))
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no quantity")
    return float(match[1]) * _UNITS[match[2]]
