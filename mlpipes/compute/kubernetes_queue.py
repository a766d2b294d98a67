"""Queues: a job's place in a queue of Kueue, asked for without reading the whole queue.

A queue may hold hundreds of jobs, each of which asks for its place, and a workload is as long as all of its pods' templates.
"""

from collections.abc import Sequence

from mlpipes.compute.kubernetes_api import KubernetesApi
from mlpipes.compute.kubernetes_reasons import Thing, conditions_of

JOB_LABEL = "kueue.x-k8s.io/job-uid"
_FEW = 50
"""So many workloads of a namespace are read to count those ahead, where Kueue does not say it."""


def workload_of(api: KubernetesApi, job: Thing) -> Thing | None:
    """Kueue's workload for a job; None where there is no Kueue, or it has not made one yet."""
    path = api.kueue("workloads")
    return next(iter(api.items(path, labels=f"{JOB_LABEL}={job['metadata']['uid']}")), None) if path else None


def ahead(api: KubernetesApi, workload: Thing) -> int | None:
    """How many jobs of its queue come before one; None where that is not for us to see.

    Kueue tells it from its memory (https://kueue.sigs.k8s.io/docs/tasks/manage/monitor_pending_workloads/); where it does
    not, or we may not ask, a short queue is read.
    """
    if path := api.visible_queue(workload["spec"].get("queueName", "")):
        pending = (api.glimpse(path) or {}).get("items", [])
        for item in pending:
            if item["metadata"]["name"] == workload["metadata"]["name"]:
                return int(item["positionInLocalQueue"])
    found = api.glimpse(str(api.kueue("workloads")), limit=str(_FEW)) or {"metadata": {"continue": "?"}}
    return None if found["metadata"].get("continue") else ahead_of(workload, found["items"])


def ahead_of(workload: Thing, queued: Sequence[Thing]) -> int:
    """How many workloads of the same queue would be admitted before one: of higher priority, or as high and older."""

    def rank(thing: Thing) -> tuple[int, str, str]:
        made = thing["metadata"].get("creationTimestamp", "")
        return -int(thing["spec"].get("priority") or 0), made, thing["metadata"].get("uid", "")

    def waits(thing: Thing) -> bool:
        conditions = conditions_of(thing)
        done = any(conditions.get(name, {}).get("status") == "True" for name in ("QuotaReserved", "Finished"))
        return not done and thing["spec"].get("active") is not False

    same = [thing for thing in queued if thing["spec"].get("queueName") == workload["spec"].get("queueName")]
    return sum(waits(thing) and rank(thing) < rank(workload) for thing in same)
