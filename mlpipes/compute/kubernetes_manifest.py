"""The RayJob of one attempt: what KubeRay's operator is asked for, made from a scale and a site's settings."""

import hashlib
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlpipes.compute.kubernetes_pods import PREFIX, Pods, pod_template
from mlpipes.compute.kubernetes_settings import KubernetesSettings
from mlpipes.scales import RayScaleConfig
from mlpipes.store.identity import identity_of
from mlpipes.store.layout import JobFolder, Store
from mlpipes.store.training_job import TrainingJob

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
NAME_LABEL, STORE_LABEL, FOLDER_ANNOTATION = f"{PREFIX}/training", f"{PREFIX}/store", f"{PREFIX}/folder"
QUEUE_LABEL, QUEUE_PRIORITY_LABEL = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
WORKERS = "workers"
_NAME_CHARACTERS, _ATTEMPT_CHARACTERS, _LABEL_CHARACTERS = 47, len("-a99999"), 63
_OBJECT_STORE_BYTES = 256 * 1024 * 1024  # data travel through the memory-mapped snapshot, not the object store


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
    """By which the RayJobs of one store are told from those of another, also of one that is mounted at the same path."""
    return identity_of(Store(Path(store))) or hashlib.sha256(store.encode()).hexdigest()[:8]


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
    pods = Pods(
        job=attempt.id,
        labels=labels,
        environment=attempt.environment,
        workers=needed.workers,
        gpus=needed.gpus,
        farewell=" ".join(farewell) if subject.is_training else None,
    )
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
                    "template": pod_template("head", pods, scale, settings),
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
                        "template": pod_template("worker", pods, scale, settings),
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
