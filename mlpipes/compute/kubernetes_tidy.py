"""Tidying a cluster: what nobody follows any more is not left there, and is not held up by a dead node either."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
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


def tidy(settings: KubernetesSettings, store: str, is_followed: Callable[[str], bool]) -> Iterator[str]:
    """Tidy up after the RayJobs of a store whose Dagster run `is_followed` says is over; yields what was done, in words.

    Those that have ended, or whose result is there, are deleted. What no run of Dagster asked for, such as a video of the
    command line, is deleted by whoever did, and here if it ended long ago. Those that work go on, as they do when Dagster is
    away; only pods that a dead node holds are removed. Raises ConnectionError or RefusedError.
    """
    api = KubernetesApi(settings, patience_seconds=15)
    for job in api.items(api.ray_jobs(), labels=f"{STORE_LABEL}={store_label(store)}"):
        metadata, name = job["metadata"], job["metadata"]["name"]
        run = metadata["annotations"].get(f"{PREFIX}/dagster-run", "")
        if is_followed(run):
            continue
        folder, status = JobFolder(Path(metadata["annotations"][FOLDER_ANNOTATION])), job.get("status") or {}
        is_over = status.get("jobDeploymentStatus") in _ENDED
        if run:
            is_over = is_over or folder.result.is_file()
        else:
            is_over = is_over and _seconds_since(status.get("endTime")) > _STUCK_SECONDS
        if is_over and not metadata.get("deletionTimestamp"):
            api.delete(api.ray_jobs(name))
            yield f"RayJob {name} has ended and nobody follows it: deleted"
        pods = api.items(api.core("pods"), labels=f"{PREFIX}/job={name}")
        for pod in {*silent_nodes(pods), *_stuck(pods)}:
            api.delete(api.core("pods", pod), gracePeriodSeconds=0)
            yield f"pod {pod} of RayJob {name} was held by a node that does not answer: removed"


def _stuck(pods: list[dict[str, Any]]) -> Iterator[str]:
    """Pods whose grace was over long ago."""
    for pod in pods:
        if _seconds_since(pod["metadata"].get("deletionTimestamp")) > _STUCK_SECONDS:
            yield pod["metadata"]["name"]


def _seconds_since(time: str | None) -> float:
    """How long ago something was; 0 where it is not known."""
    return (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds() if time else 0.0
