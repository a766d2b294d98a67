"""Tidying a cluster: what nobody follows any more is not left there, and is not held up by a dead node either."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from enum import Enum, auto
from pathlib import Path
from typing import Any

from mlpipes.compute.kubernetes_api import KubernetesApi
from mlpipes.compute.kubernetes_manifest import FOLDER_ANNOTATION, PREFIX, STORE_LABEL, store_label
from mlpipes.compute.kubernetes_reasons import silent_nodes
from mlpipes.compute.kubernetes_settings import KubernetesSettings
from mlpipes.store.layout import JobFolder

_ENDED = ("Complete", "Failed", "ValidationFailed")
_STUCK_SECONDS = 300.0
"""How long after its grace a pod is stuck: the follower, who looks more closely, would have removed it long before."""


class Wanted(Enum):
    """Whether anybody wants what a Dagster run has asked for."""

    FOLLOWED = auto()
    """That run, or another one that may have attached to its training, is not over."""
    NO_MORE = auto()
    """The run is over, and nobody is there."""
    CANCELLED = auto()
    """It was cancelled, and nobody is there."""


def tidy(settings: KubernetesSettings, store: str, wanted: Callable[[str], Wanted]) -> Iterator[str]:
    """Tidy up after the RayJobs of a store; yields what was done, in words.

    Pods that a dead node holds are removed, also where somebody follows: it may be on that very node. Of those whose Dagster
    run is over by what `wanted` says of its id, what has ended, or whose result is there, is deleted, and all that were
    cancelled: whoever cancelled them may not have reached the cluster. What no run of Dagster asked for, such as a video of
    the command line, is deleted by whoever did, and here if it ended long ago. What works goes on, as it does when Dagster
    is away. Raises ConnectionError or RefusedError.
    """
    api = KubernetesApi(settings, patience_seconds=15)
    ours = f"{STORE_LABEL}={store_label(store)}"
    jobs, pods = api.items(api.ray_jobs(), labels=ours), api.items(api.core("pods"), labels=ours)
    for job in jobs:
        metadata, name = job["metadata"], job["metadata"]["name"]
        of_job = [pod for pod in pods if pod["metadata"]["labels"].get(f"{PREFIX}/job") == name]
        who = wanted(metadata["annotations"].get(f"{PREFIX}/dagster-run", ""))
        cancelled = who == Wanted.CANCELLED
        if who != Wanted.FOLLOWED and (cancelled or _is_over(job)) and not metadata.get("deletionTimestamp"):
            api.delete(api.ray_jobs(name))
            yield f"RayJob {name} {'was cancelled' if cancelled else 'has ended'} and nobody follows it: deleted"
        for pod in {*silent_nodes(of_job), *([] if who == Wanted.FOLLOWED else _stuck(of_job))}:
            api.delete(api.core("pods", pod), gracePeriodSeconds=0)
            yield f"pod {pod} of RayJob {name} was held by a node that does not answer: removed"


def _is_over(job: dict[str, Any]) -> bool:
    annotations, status = job["metadata"]["annotations"], job.get("status") or {}
    has_ended = status.get("jobDeploymentStatus") in _ENDED
    if annotations.get(f"{PREFIX}/dagster-run"):
        return has_ended or JobFolder(Path(annotations[FOLDER_ANNOTATION])).result.is_file()
    return has_ended and _seconds_since(status.get("endTime")) > _STUCK_SECONDS


def _stuck(pods: list[dict[str, Any]]) -> Iterator[str]:
    """Pods whose grace was over long ago."""
    for pod in pods:
        if _seconds_since(pod["metadata"].get("deletionTimestamp")) > _STUCK_SECONDS:
            yield pod["metadata"]["name"]


def _seconds_since(time: str | None) -> float:
    """How long ago something was; 0 where it is not known."""
    return (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds() if time else 0.0
