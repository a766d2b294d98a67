"""Settings, manifests and objects as the API server has them, for tests of Kubernetes that talk to no cluster."""

from pathlib import Path
from typing import Any

from mlpipes.compute.kubernetes_manifest import (
    Attempt,
    ray_job,
    training,
)
from mlpipes.compute.kubernetes_settings import KubernetesSettings
from mlpipes.scales import RayScaleConfig
from mlpipes_tests.compute.test_jobs import job_in

W2 = RayScaleConfig.from_key("w2-b128-e30-g0")
LEAST = "image: registry/mlpipes:1\nstore: {claim: store, mount_path: /shared}\n"


def written(folder: Path, text: str) -> Path:
    (folder / "kubernetes.yaml").write_text(text)
    return folder / "kubernetes.yaml"


def settings(**changes: Any) -> KubernetesSettings:
    least = {"image": "registry/mlpipes:1", "store": {"claim": "store", "mount_path": "/shared"}}
    return KubernetesSettings.model_validate(least | changes)


def manifest(folder: Path, scale: RayScaleConfig = W2, **changes: Any) -> dict[str, Any]:
    attempt = Attempt(
        "digits-w2-13c6ba78", 1, folder / "a1.json", {"MLPIPES_HOME": "/shared/home"}, training(job_in(folder))
    )
    return ray_job(attempt, scale, settings(**changes))


def template(made: dict[str, Any], role: str) -> dict[str, Any]:
    cluster = made["spec"]["rayClusterSpec"]
    return (cluster["headGroupSpec"] if role == "head" else cluster["workerGroupSpecs"][0])["template"]


def job(deployed: str = "", ray: str = "", suspend: bool = False, **status: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "digits-a1", "uid": "u", "labels": {"kueue.x-k8s.io/queue-name": "training"}},
        "spec": {"suspend": suspend, "rayClusterSpec": {"workerGroupSpecs": [{"replicas": 1}]}},
        "status": {"jobDeploymentStatus": deployed, "jobStatus": ray, **status},
    }


def pod(
    role: str = "worker", ready: bool = True, container: dict[str, Any] | None = None, **status: Any
) -> dict[str, Any]:
    conditions = [{"type": "Ready", "status": str(ready)}, *status.pop("conditions", [])]
    limits = {"memory": "4Gi", "nvidia.com/gpu": "4"}
    return {
        "metadata": {"name": f"{role}-x", "labels": {"ray.io/node-type": role}},
        "spec": {"containers": [{"name": "ray", "resources": {"limits": limits, "requests": limits}}]},
        "status": {"conditions": conditions, "containerStatuses": [{"name": "ray", **(container or {})}], **status},
    }


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    return {"image": "registry/x:1", "state": {"waiting": {"reason": reason, "message": message}}}


def workload(number: int = 0, reserved: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    condition = {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": "1 more needed"}
    more = changes.pop("conditions", [])
    return {
        "metadata": {
            "name": f"w{number}",
            "uid": str(number),
            "creationTimestamp": f"2026-01-01T00:00:{number:02}Z",
        },
        "spec": {"queueName": "training", "priority": 0, **changes},
        "status": {"conditions": [condition | (reserved or {}), *more]},
    }


def forbids(why: str) -> dict[str, Any]:
    said = f'Failed to create worker Pod for the cluster x, pods "x" is forbidden: {why}'
    return {"reason": "FailedToCreateWorkerPod", "message": said}
