"""The pods of a RayJob, head and workers: what they may, what they run, where they go, and how long they stay.

They keep to the security standard *restricted*: no root, no privilege, a root file system that cannot be written.
"""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlpipes.compute.kubernetes_settings import (
    SHARED_MEMORY,
    STORE,
    TEMPORARY,
    KubernetesSettings,
    SecretKey,
)
from mlpipes.scales import RayScaleConfig

PREFIX = "mlpipes.io"
_STOP_SECONDS = 10
"""What Ray gets to end after a last checkpoint."""
_UNANSWERED = ("node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready")
_KEEP = {
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
}
"""Asks autoscalers not to move a pod for tidiness: a training would lose a minute by it."""
_HEADLESS_SECONDS = 10
"""How long a worker's Ray looks for its head, instead of 60."""
_SILENT_SECONDS = 10
"""After how long without an answer, also to a ping, a connection counts as lost, instead of two to seven minutes."""
_KNOWN_SECONDS = 2
"""How often a worker asks whether its head knows it, instead of every 60. A new one does not, and it has to start anew."""
_AWAIT_HEAD = (
    "trap 'exit 143' TERM; "
    """until {python} -c 'import os, socket; socket.create_connection((os.environ["FQ_RAY_IP"], """
    """int(os.environ.get("RAY_PORT", "6379"))), 2)' 2>/dev/null; do sleep 1; done; trap - TERM"""
)
"""What a worker does first. Where `ray start` fails for want of a head, the kubelet lets it wait ever longer."""


@dataclass(frozen=True)
class Pods:
    """What the pods of one RayJob have in common."""

    job: str
    """The RayJob's name."""
    labels: Mapping[str, str]
    environment: Mapping[str, str]
    workers: int
    """Of a worker pod."""
    gpus: int
    """Of a worker pod."""
    farewell: str | None
    """What each runs when it is told to go; None where there is nothing to save."""


def pod_template(role: str, pods: Pods, scale: RayScaleConfig, settings: KubernetesSettings) -> dict[str, Any]:
    """The template of a `head` or `worker` pod."""
    is_worker = role == "worker"
    pools = [settings, *([settings.spot] if settings.spot and is_worker else [])]
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": (0 if pods.farewell is None else settings.save_seconds) + _STOP_SECONDS,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
            **({"runAsUser": settings.run_as_user, "runAsGroup": settings.run_as_user} if settings.run_as_user else {}),
            **({"fsGroup": settings.fs_group} if settings.fs_group else {}),
        },
        "nodeSelector": {key: value for pool in pools for key, value in pool.node_selector.items()},
        "tolerations": [
            *(toleration.model_dump(exclude_none=True) for pool in pools for toleration in pool.tolerations),
            # By default a pod of a silent node stays for five minutes, in which nothing takes its place.
            *(
                {
                    "key": key,
                    "operator": "Exists",
                    "effect": "NoExecute",
                    "tolerationSeconds": settings.node_lost_seconds,
                }
                for key in _UNANSWERED
            ),
        ],
        "volumes": [
            {"name": STORE, "persistentVolumeClaim": {"claimName": settings.store.claim}},
            {"name": TEMPORARY, "emptyDir": {}},
            {"name": SHARED_MEMORY, "emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}},
            *settings.volumes,
        ],
        "containers": [_container(role, pods, scale, settings)],
    }
    if settings.service_account:
        spec["serviceAccountName"] = settings.service_account
    if settings.priority_class:
        spec["priorityClassName"] = settings.priority_class
    if settings.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    if is_worker and settings.placement != "any":
        spec["affinity"] = _affinity(settings.placement, pods.job)
    template = {
        "metadata": {"labels": {**pods.labels, f"{PREFIX}/job": pods.job}, "annotations": dict(_KEEP)},
        "spec": spec,
    }
    return merged(template, settings.worker_pod if is_worker else settings.head_pod)


def _container(role: str, pods: Pods, scale: RayScaleConfig, settings: KubernetesSettings) -> dict[str, Any]:
    if role == "worker":
        cpu = _times(settings.cpu_per_worker or f"{scale.cpus_per_worker:g}", pods.workers)
        memory = _times(settings.memory_per_worker, pods.workers)
    else:
        cpu, memory = settings.head_cpu, settings.head_memory
    gpus = {settings.gpu_resource: str(pods.gpus)} if role == "worker" and pods.gpus else {}
    own = {
        "HOME": "/tmp",  # noqa: S108 - a volume of the pod
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        # Both sides have to agree on this: a head takes more pings than it expects for an attack.
        "RAY_grpc_client_keepalive_time_ms": str(_SILENT_SECONDS * 1000),
        "RAY_grpc_client_keepalive_timeout_ms": str(_SILENT_SECONDS * 1000),
    }
    if role == "worker":
        own["RAY_gcs_rpc_server_reconnect_timeout_s"] = str(_HEADLESS_SECONDS)
        own["RAY_raylet_liveness_self_check_interval_ms"] = str(_KNOWN_SECONDS * 1000)
    container: dict[str, Any] = {
        "name": "ray",
        "image": settings.image,
        "env": [
            _variable(name, value) for name, value in (own | dict(pods.environment) | settings.environment).items()
        ],
        "resources": {"requests": {"cpu": cpu, "memory": memory, **gpus}, "limits": {"memory": memory, **gpus}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {
                "name": STORE,
                "mountPath": settings.store.mount_path,
                **({"subPath": settings.store.sub_path} if settings.store.sub_path else {}),
            },
            {"name": TEMPORARY, "mountPath": "/tmp"},  # noqa: S108 - a volume of the pod
            {"name": SHARED_MEMORY, "mountPath": "/dev/shm"},  # noqa: S108
            *settings.mounts,
        ],
    }
    if role == "worker":  # KubeRay runs it before its own command
        container["command"] = [_AWAIT_HEAD.format(python=shlex.quote(settings.python))]
    if pods.farewell is not None:
        # SIGTERM would reach only `ray start`, which ends its workers without a word.
        container["lifecycle"] = {"preStop": {"exec": {"command": ["/bin/sh", "-c", pods.farewell]}}}
    if settings.image_pull_policy:
        container["imagePullPolicy"] = settings.image_pull_policy
    if settings.environment_from:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in settings.environment_from]
    return container


def _variable(name: str, value: str | SecretKey) -> dict[str, Any]:
    if isinstance(value, SecretKey):
        return {"name": name, "valueFrom": {"secretKeyRef": {"name": value.secret, "key": value.key}}}
    return {"name": name, "value": value}


def _affinity(placement: str, job: str) -> dict[str, Any]:
    term = {
        "weight": 100,
        "podAffinityTerm": {
            "topologyKey": "kubernetes.io/hostname",
            "labelSelector": {"matchLabels": {f"{PREFIX}/job": job, "ray.io/node-type": "worker"}},
        },
    }
    kind = "podAntiAffinity" if placement == "spread" else "podAffinity"
    return {kind: {"preferredDuringSchedulingIgnoredDuringExecution": [term]}}


def _times(quantity: str, number: int) -> str:
    """A quantity so many times: `500m` twice is `1000m`."""
    digits = re.match(r"[\d.]+", quantity)
    assert digits is not None  # noqa: S101 - the settings let no other through
    return f"{float(digits[0]) * number:.6g}{quantity[digits.end() :]}"


def merged(base: Any, patch: Any) -> Any:
    """A manifest with a patch merged into it: mappings key by key, lists of things with a name by that, others replaced."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return {**base, **{key: merged(base.get(key), value) for key, value in patch.items()}}
    if isinstance(base, list) and isinstance(patch, list) and base and all(_named(item) for item in [*base, *patch]):
        result = {item["name"]: item for item in base}
        for item in patch:
            result[item["name"]] = merged(result.get(item["name"]), item)
        return list(result.values())
    return json.loads(json.dumps(patch))


def _named(item: Any) -> bool:
    # Mounts are told apart by their paths, and one volume may be mounted twice.
    return isinstance(item, dict) and "name" in item and "mountPath" not in item
