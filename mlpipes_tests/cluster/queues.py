"""Kueue's objects that make a queue."""

from mlpipes_tests.cluster import software
from mlpipes_tests.cluster.kubectl import Manifest

LABEL = "kueue.x-k8s.io/queue-name"
"""The label by which a job waits in a queue."""
NAME = "training"
"""Of the queue in each namespace."""
_VERSION = "kueue.x-k8s.io/v1beta2"


def queue(namespace: str, quota: dict[str, str]) -> list[Manifest]:
    """A queue of a namespace with a quota (`{"cpu": "2", "memory": "8Gi"}`); a higher priority preempts a lower one."""
    resources = [{"name": name, "nominalQuota": amount} for name, amount in quota.items()]
    return [
        _named("ResourceFlavor", namespace),
        _named("ClusterQueue", namespace)
        | {
            "spec": {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
                "preemption": {"withinClusterQueue": "LowerPriority"},
                "resourceGroups": [
                    {"coveredResources": list(quota), "flavors": [{"name": namespace, "resources": resources}]}
                ],
            }
        },
        _named("LocalQueue", NAME, namespace=namespace) | {"spec": {"clusterQueue": namespace}},
    ]


def teams(namespace: str, quotas: dict[str, dict[str, str]]) -> list[Manifest]:
    """A queue a team, each with a quota of its own: a team borrows what others do not use, until they want it back."""
    manifests = [_named("ResourceFlavor", namespace)]
    for team, quota in quotas.items():
        resources = [{"name": name, "nominalQuota": amount} for name, amount in quota.items()]
        flavors = [{"name": namespace, "resources": resources}]
        manifests += [
            _named("ClusterQueue", f"{namespace}-{team}")
            | {
                "spec": {
                    "cohortName": namespace,
                    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
                    "preemption": {"reclaimWithinCohort": "Any"},
                    "resourceGroups": [{"coveredResources": list(quota), "flavors": flavors}],
                }
            },
            _named("LocalQueue", team, namespace=namespace) | {"spec": {"clusterQueue": f"{namespace}-{team}"}},
        ]
    return manifests


def priority(name: str, value: int) -> Manifest:
    """A priority that jobs name by the label `kueue.x-k8s.io/priority-class`."""
    return _named("WorkloadPriorityClass", name) | {"value": value}


def urgent_job(namespace: str, queue: str = NAME, cpu: str = "600m") -> Manifest:
    """A job that takes nearly all of a queue until the test says so, by a file in the store."""
    wait = f"until [ -e {software.STORE}/urgent ]; do sleep 1; done"
    spec = software.pod_spec(["sh", "-c", wait], resources={"requests": {"cpu": cpu, "memory": "64Mi"}})
    labels = {LABEL: queue, "kueue.x-k8s.io/priority-class": "urgent"}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "urgent", "namespace": namespace, "labels": labels},
        "spec": {"template": {"spec": spec}, "backoffLimit": 0},
    }


def of_cluster(namespace: str) -> list[str]:
    """Which of a queue's objects a deletion of the namespace leaves: arguments of `kubectl delete`."""
    return ["clusterqueue,resourceflavor", namespace]


def _named(kind: str, name: str, **metadata: str) -> Manifest:
    return {"apiVersion": _VERSION, "kind": kind, "metadata": {"name": name} | metadata}
