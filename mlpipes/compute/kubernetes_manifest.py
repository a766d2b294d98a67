"""The RayJob of one attempt: what KubeRay's operator is asked for, made from a scale and a site's settings.

Pods keep to the security standard *restricted*: no root, no privilege, a root file system that cannot be written.
"""

import hashlib
import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlpipes.compute.kubernetes_settings import (
    SHARED_MEMORY,
    STORE,
    TEMPORARY,
    KubernetesSettings,
    SecretKey,
)
from mlpipes.scales import RayScaleConfig
from mlpipes.store.layout import JobFolder
from mlpipes.store.training_job import TrainingJob

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
PREFIX = "mlpipes.io"
NAME_LABEL, STORE_LABEL, FOLDER_ANNOTATION = f"{PREFIX}/training", f"{PREFIX}/store", f"{PREFIX}/folder"
QUEUE_LABEL, QUEUE_PRIORITY_LABEL = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
WORKERS = "workers"
_NAME_CHARACTERS, _ATTEMPT_CHARACTERS, _LABEL_CHARACTERS = 47, len("-a99999"), 63
_OBJECT_STORE_BYTES = 256 * 1024 * 1024  # data travel through the memory-mapped snapshot, not the object store
_STOP_SECONDS = 10
"""What Ray gets to end after a last checkpoint."""
_UNANSWERED = ("node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready")
_KEEP = {
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
}
"""Asks autoscalers not to move a pod for tidiness: a training would lose a minute by it."""


@dataclass(frozen=True)
class Subject:
    """What a RayJob makes: by what it is labelled, and which program of ours its entry point and its pods run."""

    workload: str
    fingerprint: str
    folder: JobFolder
    store: str
    requested_by: str
    """The Dagster run; empty if none."""
    entry: str
    """A module that takes a specification and the RayJob's name."""
    is_training: bool = True
    """Otherwise there is nothing to save when a pod is told to go, and its driver is on the head and no worker."""
    min_workers: int | None = None


def training(job: TrainingJob) -> Subject:
    """A training as what a RayJob makes."""
    return Subject(
        workload=job.recipe.workload,
        fingerprint=job.recipe.fingerprint,
        folder=job.folder,
        store=job.store,
        requested_by=job.requested_by,
        entry="mlpipes.compute.kubernetes_entry",
        min_workers=job.min_workers,
    )


@dataclass(frozen=True)
class Attempt:
    """What a RayJob is for."""

    name: str
    """Of what it makes, as `training_name` makes it."""
    number: int
    specification: Path
    environment: Mapping[str, str]
    subject: Subject

    @property
    def id(self) -> str:
        """The RayJob's name."""
        return f"{self.name}-a{self.number}"


def training_name(identity: str, readable: str) -> str:
    """The name under which a training's RayJobs are found: what people read, and a hash of what it is.

    A DNS label as of RFC 1035, short enough for an attempt's number behind it and KubeRay's suffixes behind that.
    """
    hashed = hashlib.sha256(identity.encode()).hexdigest()[:8]
    words = re.sub(r"[^a-z0-9]+", "-", readable.lower()).strip("-")
    words = words if words[:1].isalpha() else f"t-{words}"
    return f"{words[: _NAME_CHARACTERS - _ATTEMPT_CHARACTERS - len(hashed) - 1].strip('-')}-{hashed}"


def label_value(text: str) -> str:
    """A text as the value of a label: what a label cannot hold replaced, and cut."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:_LABEL_CHARACTERS].strip("-._")


def store_label(store: str) -> str:
    """By which the RayJobs of one store are told from those of another."""
    return hashlib.sha256(store.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Shape:
    """What a scale needs: so many worker pods, with so much in each."""

    pods: int
    workers: int
    """In each pod; the last one may have fewer."""
    cpus: float
    """Of the workers in a pod."""
    gpus: int


def shape(scale: RayScaleConfig, settings: KubernetesSettings) -> Shape:
    """The worker pods of a scale. By default one worker each, or as many as make their CPUs and GPUs whole."""
    per_pod = settings.workers_per_pod or next(
        (
            number
            for number in range(1, scale.workers + 1)
            if all(_is_whole(number * share) for share in (scale.cpus_per_worker, scale.gpus_per_worker))
        ),
        scale.workers,
    )
    per_pod = min(per_pod, scale.workers)
    return Shape(
        pods=math.ceil(scale.workers / per_pod),
        workers=per_pod,
        cpus=per_pod * scale.cpus_per_worker,
        gpus=math.ceil(round(per_pod * scale.gpus_per_worker, 4)),
    )


def _is_whole(number: float) -> bool:
    return abs(number - round(number)) < 1e-6


def ray_job(
    attempt: Attempt, scale: RayScaleConfig, settings: KubernetesSettings, owner: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The manifest of an attempt; `owner` is the uid and so on of what it is to be deleted with.

    A queue admits it by lifting `suspend`; without a queue it starts at once.
    """
    needed = shape(scale, settings)
    subject = attempt.subject
    entry = [settings.python, "-m", subject.entry]
    arguments = [shlex.quote(str(attempt.specification)), attempt.id]
    labels = {
        NAME_LABEL: attempt.name,
        f"{PREFIX}/workload": label_value(subject.workload),
        f"{PREFIX}/scale": label_value(scale.key),
        f"{PREFIX}/fingerprint": subject.fingerprint[:_LABEL_CHARACTERS],
        STORE_LABEL: store_label(subject.store),
        f"{PREFIX}/dagster-run": label_value(subject.requested_by),
    }
    annotations = {
        FOLDER_ANNOTATION: str(subject.folder.path),
        f"{PREFIX}/workload": subject.workload,
        f"{PREFIX}/scale": scale.key,
        f"{PREFIX}/fingerprint": subject.fingerprint,
        f"{PREFIX}/dagster-run": subject.requested_by,
    }
    queue = {QUEUE_LABEL: settings.queue, QUEUE_PRIORITY_LABEL: settings.queue_priority}
    farewell = [*entry, "--farewell", str(settings.save_seconds), *arguments]

    def pod(role: str) -> dict[str, Any]:
        return _pod(role, attempt, needed, scale, settings, labels, " ".join(farewell))

    auth = {"authOptions": {"mode": "token"}} if settings.ray_token else {}
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "RayJob",
        "metadata": {
            "name": attempt.id,
            "namespace": settings.namespace,
            "labels": labels | {name: value for name, value in queue.items() if value},
            "annotations": annotations,
            **({"ownerReferences": [dict(owner)]} if owner else {}),
        },
        "spec": {
            # exec: without it a shell stands between Ray and the driver, and the driver survives the head's death.
            "entrypoint": " ".join(["exec", *entry, *arguments]),
            **(_reserved(scale) if subject.is_training else {}),
            "submissionMode": "HTTPMode",
            "backoffLimit": 0,
            "shutdownAfterJobFinishes": True,
            # Kueue gives the quota away when the job has finished, so the pods are to be gone as well.
            "ttlSecondsAfterFinished": 0,
            "suspend": settings.queue is not None,
            "rayClusterSpec": {
                "rayVersion": settings.ray_version or version("ray"),
                **auth,
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0", **_START},  # noqa: S104 - the pod's network; the operator submits there
                    "template": pod("head"),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": WORKERS,
                        **dict.fromkeys(("replicas", "minReplicas"), _at_first(subject, needed, settings)),
                        "maxReplicas": needed.pods,
                        "rayStartParams": {
                            "num-cpus": str(math.ceil(needed.cpus)),
                            "num-gpus": str(needed.gpus),
                            **_START,
                        },
                        "template": pod("worker"),
                    }
                ],
            },
        },
    }


def _at_first(subject: Subject, needed: Shape, settings: KubernetesSettings) -> int:
    """With how many worker pods it begins. KubeRay submits when all are ready; an elastic training asks for more then.

    A queue admits a job whole, so nothing could be asked for later.
    """
    if subject.min_workers is None or settings.queue:
        return needed.pods
    return math.ceil(subject.min_workers / needed.workers)


_START = {"object-store-memory": str(_OBJECT_STORE_BYTES)}


def _reserved(scale: RayScaleConfig) -> dict[str, Any]:
    """What the entry point itself needs: the only worker of a scale, it is to run in a worker's pod, with its devices."""
    if not scale.trains_in_driver:
        return {}
    gpus = {"entrypointNumGpus": scale.gpus_per_worker} if scale.gpus_per_worker else {}
    return {"entrypointNumCpus": scale.cpus_per_worker} | gpus


def _pod(
    role: str,
    attempt: Attempt,
    needed: Shape,
    scale: RayScaleConfig,
    settings: KubernetesSettings,
    labels: Mapping[str, str],
    farewell: str,
) -> dict[str, Any]:
    is_worker = role == "worker"
    pools = [settings, *([settings.spot] if settings.spot and is_worker else [])]
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": (settings.save_seconds if attempt.subject.is_training else 0) + _STOP_SECONDS,
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
        "containers": [_container(role, attempt, needed, scale, settings, farewell)],
    }
    if settings.service_account:
        spec["serviceAccountName"] = settings.service_account
    if settings.priority_class:
        spec["priorityClassName"] = settings.priority_class
    if settings.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    if is_worker and settings.placement != "any":
        spec["affinity"] = _affinity(settings.placement, attempt.id)
    template = {
        "metadata": {"labels": {**labels, f"{PREFIX}/job": attempt.id}, "annotations": dict(_KEEP)},
        "spec": spec,
    }
    return merged(template, settings.worker_pod if is_worker else settings.head_pod)


def _container(
    role: str,
    attempt: Attempt,
    needed: Shape,
    scale: RayScaleConfig,
    settings: KubernetesSettings,
    farewell: str,
) -> dict[str, Any]:
    if role == "worker":
        cpu = _times(settings.cpu_per_worker or f"{scale.cpus_per_worker:g}", needed.workers)
        memory = _times(settings.memory_per_worker, needed.workers)
    else:
        cpu, memory = settings.head_cpu, settings.head_memory
    gpus = {settings.gpu_resource: str(needed.gpus)} if role == "worker" and needed.gpus else {}
    own = {
        "HOME": "/tmp",  # noqa: S108 - a volume of the pod
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
    }
    container: dict[str, Any] = {
        "name": "ray",
        "image": settings.image,
        "env": [
            _variable(name, value) for name, value in (own | dict(attempt.environment) | settings.environment).items()
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
    if attempt.subject.is_training:
        # SIGTERM would reach only `ray start`, which ends its workers without a word.
        container["lifecycle"] = {"preStop": {"exec": {"command": ["/bin/sh", "-c", farewell]}}}
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
