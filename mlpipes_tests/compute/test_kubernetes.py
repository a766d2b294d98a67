"""Kubernetes without a cluster: settings, the manifest of a scale, names, and what the API server's words mean."""

import os
import re
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlpipes.compute.jobs import JobState
from mlpipes.compute.kubernetes import KubernetesJobs
from mlpipes.compute.kubernetes_api import KubernetesApi
from mlpipes.compute.kubernetes_entry import UNUSABLE_VOLUME
from mlpipes.compute.kubernetes_manifest import (
    FOLDER_ANNOTATION,
    PREFIX,
    Attempt,
    Subject,
    label_value,
    ray_job,
    shape,
    training,
    training_name,
)
from mlpipes.compute.kubernetes_pods import merged
from mlpipes.compute.kubernetes_reasons import Look, quantity, silent_nodes, standing
from mlpipes.compute.kubernetes_settings import KubernetesSettings
from mlpipes.compute.kubernetes_tidy import tidy
from mlpipes.compute.places import has_queue, jobs_for
from mlpipes.errors import ConfigError, ScaleError
from mlpipes.scales import RayScaleConfig
from mlpipes.store.layout import JobFolder
from mlpipes_tests.compute.test_jobs import job_in
from mlpipes_tests.sandbox import CHECKOUT, free_port
from mlpipes_tests.waiting import until

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


# -- settings ---------------------------------------------------------------------------------------------------------
BAD = [
    ("", "image: Field required"),
    ("imagee: x\n" + LEAST, "imagee: Extra inputs are not permitted .* Known: image, store"),
    (LEAST.replace("registry/mlpipes:1", "'Registry/ mlpipes'"), "image: write an image such as"),
    (LEAST.replace("/shared", "shared"), "store.mount_path: write an absolute path"),
    (LEAST.replace("/shared", "/a/../b"), "store.mount_path: write an absolute path"),
    (LEAST.replace("claim: store", "claim: My_Store"), "store.claim: write a name of lower-case letters"),
    (LEAST.replace("claim: store, ", ""), "store.claim: Field required"),
    (LEAST + "namespace: Team_A", "namespace: write lower-case letters"),
    (LEAST + f"namespace: {'a' * 64}", "namespace: write lower-case letters"),
    (LEAST + "context: [a]", "context: Input should be a valid string"),
    (LEAST + "image_pull_policy: Sometimes", "image_pull_policy: Input should be 'Always', 'IfNotPresent' or 'Never'"),
    (LEAST + "image_pull_secrets: regcred", "image_pull_secrets: Input should be a valid list"),
    (LEAST + "image_pull_secrets: [Reg Cred]", "image_pull_secrets.0: write a name"),
    (LEAST + "python: ''", "python: String should have at least 1 character"),
    (LEAST + "run_as_user: 0", "run_as_user: Input should be greater than or equal to 1"),
    (LEAST + "fs_group: staff", "fs_group: Input should be a valid integer"),
    (LEAST + "queue_priority: low", "queue_priority is one of a queue; name the `queue`"),
    (LEAST + "queue: Training!", "queue: write a name"),
    (LEAST + "volumes: [{emptyDir: {}}]", "each needs a `name`"),
    (LEAST + "volumes: [{name: tmp, emptyDir: {}}]", "'tmp' is there already"),
    (LEAST + "volumes: [{name: a}, {name: a}]", "'a' is there already"),
    (LEAST + "mounts: [{name: data, mountPath: /data}]", "there is no volume 'data'"),
    (LEAST + "volumes: [{name: a}]\nmounts: [{name: a, mountPath: data}]", "write an absolute path"),
    (LEAST + "volumes: [{name: a}]\nmounts: [{name: a, mountPath: /shared}]", "/shared is mounted twice"),
    (LEAST + "volumes: [{name: a}]\nmounts: [{name: a, mountPath: /dev/shm}]", "/dev/shm is mounted twice"),
    (LEAST + "environment: {A-B: x}", "environment.A-B.* write a name such as NCCL_SOCKET_IFNAME"),
    (LEAST + "environment: {A: {secret: s}}", "environment.A.SecretKey.key: Field required"),
    (LEAST + "environment: {A: 1}", "environment.A.str: Input should be a valid string"),
    (LEAST + "environment_from: [A_B]", "environment_from.0: write a name"),
    (LEAST + "node_selector: {pool: [a]}", "node_selector.pool: Input should be a valid string"),
    (LEAST + "node_selector: {'a b': c}", "node_selector.a b.* write a key"),
    (LEAST + "tolerations: [{key: spot, operator: Is}]", "tolerations.0.operator: Input should be 'Exists' or 'Equal'"),
    (LEAST + "tolerations: [{operator: Equal}]", "name the key"),
    (LEAST + "tolerations: [{key: a, operator: Exists, value: b}]", "there is no value"),
    (LEAST + "tolerations: [{key: a, effekt: NoSchedule}]", "tolerations.0.effekt: Extra inputs"),
    (LEAST + "spot: {selector: {a: b}}", "spot.selector: Extra inputs"),
    (LEAST + "gpu_resource: nvidia com", "gpu_resource: write a key"),
    (LEAST + "workers_per_pod: 0", "workers_per_pod: Input should be greater than or equal to 1"),
    (LEAST + "placement: tight", "placement: Input should be 'spread', 'pack' or 'any'"),
    (LEAST + "memory_per_worker: 4GB", "memory_per_worker: write a quantity as Kubernetes does"),
    (LEAST + "memory_per_worker: 0Gi", "memory_per_worker: write a quantity"),
    (LEAST + "head_cpu: -1", "head_cpu"),
    (LEAST + "shared_memory: much", "shared_memory: write a quantity"),
    (LEAST + "save_seconds: 1", "save_seconds: Input should be greater than or equal to 5"),
    (LEAST + "node_lost_seconds: -5", "node_lost_seconds: Input should be greater than or equal to 0"),
    (LEAST + "poll_seconds: 0", "poll_seconds: Input should be greater than 0"),
    (LEAST + "poll_seconds: .nan", "poll_seconds"),
    (LEAST + "head_pod: []", "head_pod: Input should be a valid dictionary"),
    (LEAST + "resubmit_deleted: perhaps", "resubmit_deleted: Input should be a valid boolean"),
    (LEAST + "scales: []", "scales: Input should be a valid dictionary"),
    (LEAST + "scales: {w2-b128-e30-g0: {quue: a}}", "scale w2-b128-e30-g0: quue: Extra inputs"),
    (LEAST + "scales: {w2-b128-e30-g0: {scales: {}}}", "none of its settings"),
    (LEAST + LEAST, "'image' occurs twice"),
    ("- a", "name: value"),
    ("a: [", "not valid YAML"),
]


@pytest.mark.parametrize(("text", "said"), BAD, ids=range(len(BAD)))
def test_each_mistake_is_named_by_file_key_and_rule(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=said) as caught:
        jobs_for(W2, kubernetes=str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value) or "YAML" in str(caught.value)


def test_there_are_enough_mistakes() -> None:
    assert len(BAD) >= 50


def test_a_wrong_scale_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScaleError, match=r"kubernetes.yaml, scales: .*not divisible"):
        KubernetesSettings.load(written(tmp_path, LEAST + "scales: {w2-b3-e1-g0: {}}"))


def test_settings_can_differ_by_scale(tmp_path: Path) -> None:
    changed = LEAST + "queue: a\nscales: {w2-b128-e30-g0: {queue: b, worker_pod: {spec: {hostNetwork: true}}}}"
    loaded = KubernetesSettings.load(written(tmp_path, changed))
    assert loaded.of_scale(W2.key).queue == "b"
    assert loaded.of_scale("w1-b1-e1-g0").queue == "a"
    made = ray_job(Attempt("a-1", 1, tmp_path, {}, training(job_in(tmp_path))), W2, loaded.of_scale(W2.key))
    assert template(made, "worker")["spec"]["hostNetwork"]
    assert "hostNetwork" not in template(made, "head")["spec"]


def test_places_exclude_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(written(tmp_path, LEAST))
    with pytest.raises(ConfigError, match=r"MLPIPES_SLURM=x and MLPIPES_KUBERNETES=.* exclude each other.* Unset one"):
        jobs_for(W2, slurm="x", kubernetes=path)
    with pytest.raises(ConfigError, match="exclude each other"):
        jobs_for(W2, address="http://head:8265", kubernetes=path)
    assert not has_queue()
    monkeypatch.setenv("MLPIPES_KUBERNETES", path)
    assert has_queue()
    assert isinstance(jobs_for(W2), KubernetesJobs)


def test_a_store_that_the_pods_do_not_mount_is_refused() -> None:
    settings().check_store(Path("/shared/home/store"))
    with pytest.raises(ConfigError, match=r"the store /elsewhere/store is not below /shared.*set MLPIPES_HOME"):
        settings().check_store(Path("/elsewhere/store"))


def test_the_settings_that_we_ship_are_valid() -> None:
    shipped = KubernetesSettings.load(CHECKOUT / "deploy" / "kubernetes" / "kubernetes.yaml")
    assert shipped.queue == "training"


# -- names and manifests ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("readable", "expected"),
    [
        ("digits-w2-b128-e30-g0", "digits-w2-b128-e30-g0-"),
        ("my_Text.model-w4-b64-e1-g0-c0.5", "my-text-model-w4-b64-e1-g0-c0-5"),
        ("7up-w1-b1-e1-g0", "t-7up-w1-b1-e1-g0-"),
        ("a-very-long-name-of-a-workload-indeed-w1000-b128000-e300-g8", "a-very-long-name-of-a-workload-"),
        ("数字-w1-b1-e1-g0", "w1-b1-e1-g0-"),
        ("", "t-"),
    ],
)
def test_a_name_is_a_label_of_47_characters_with_what_it_is_of(readable: str, expected: str) -> None:
    name = training_name("fingerprint-store", readable)
    assert name.startswith(expected[:31])
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", f"{name}-a99999")
    assert len(f"{name}-a99999") <= 47
    assert "--" not in name
    assert training_name("fingerprint-other", readable) != name


def test_two_stores_and_two_seeds_have_different_names(tmp_path: Path) -> None:
    here, there = job_in(tmp_path / "a"), job_in(tmp_path / "b")
    other = here.model_copy(update={"recipe": here.recipe.model_copy(update={"seed": 7})})
    assert len({KubernetesJobs.name_of(job) for job in (here, there, other)}) == 3


@pytest.mark.parametrize("text", ["w4-b64-e1-g0-c0.5", "a" * 200, "", "ü b/c", "-x-"])
def test_label_values_are_what_labels_can_hold(text: str) -> None:
    assert re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?", label_value(text))


@pytest.mark.parametrize(
    ("key", "changes", "expected"),
    [
        ("w2-b128-e30-g0", {}, (2, 1, 1.0, 0)),
        ("w4-b128-e30-g0-c0.5", {}, (2, 2, 1.0, 0)),
        ("w4-b128-e30-g0.5", {}, (2, 2, 2.0, 1)),
        ("w3-b129-e30-g0.5", {}, (2, 2, 2.0, 1)),
        ("w8-b128-e30-g1", {"workers_per_pod": 4}, (2, 4, 4.0, 4)),
        ("w8-b128-e30-g2", {"workers_per_pod": 99}, (1, 8, 8.0, 16)),
        ("w3-b129-e30-g0-c0.3", {}, (1, 3, 0.9, 0)),
    ],
)
def test_pods_have_the_shape_of_their_scale(
    key: str, changes: dict[str, Any], expected: tuple[int, int, float, int]
) -> None:
    made = shape(RayScaleConfig.from_key(key), settings(**changes))
    assert (made.pods, made.workers, round(made.cpus, 6), made.gpus) == expected


def test_pods_are_restricted_and_survive_tidying(tmp_path: Path) -> None:
    made = manifest(tmp_path)
    for role in ("head", "worker"):
        pod = template(made, role)
        spec, (container,) = pod["spec"], pod["spec"]["containers"]
        assert spec["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert spec["automountServiceAccountToken"] is False
        assert pod["metadata"]["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
        assert {t["tolerationSeconds"] for t in spec["tolerations"]} == {20}
        (farewell,) = container["lifecycle"]["preStop"]["exec"]["command"][2:]
        assert "--farewell 40" in farewell
        assert farewell.endswith("digits-w2-13c6ba78-a1")
        assert spec["terminationGracePeriodSeconds"] > 40
        assert {"name": "MLPIPES_HOME", "value": "/shared/home"} in container["env"]
        assert [m["mountPath"] for m in container["volumeMounts"]] == ["/shared", "/tmp", "/dev/shm"]
        assert {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}} in spec["volumes"]


def test_an_entry_point_that_is_the_only_worker_goes_to_a_workers_pod(tmp_path: Path) -> None:
    asked = ("entrypointNumCpus", "entrypointNumGpus")
    alone = manifest(tmp_path, RayScaleConfig.from_key("w1-b128-e30-g0.5-c2"))["spec"]
    assert [alone.get(name) for name in asked] == [2, 0.5]
    assert "entrypointNumGpus" not in manifest(tmp_path, RayScaleConfig.from_key("w1-b128-e30-g0"))["spec"]
    assert not set(asked) & set(manifest(tmp_path)["spec"])


def test_a_job_is_ended_by_us_and_owned_by_the_release(tmp_path: Path) -> None:
    made = manifest(tmp_path)
    spec = made["spec"]
    assert (spec["submissionMode"], spec["backoffLimit"], spec["ttlSecondsAfterFinished"]) == ("HTTPMode", 0, 0)
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["suspend"] is False
    assert "activeDeadlineSeconds" not in spec
    assert "deletionStrategy" not in spec
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "ownerReferences" not in made["metadata"]
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": "release", "uid": "u"}
    attempt = Attempt("digits-w2-13c6ba78", 1, tmp_path, {}, training(job_in(tmp_path)))
    assert ray_job(attempt, W2, settings(), owner)["metadata"]["ownerReferences"] == [owner]


def test_labels_are_short_and_annotations_whole(tmp_path: Path) -> None:
    metadata, job = manifest(tmp_path)["metadata"], job_in(tmp_path)
    assert all(len(value) <= 63 for value in metadata["labels"].values())
    assert metadata["labels"]["mlpipes.io/fingerprint"] == job.recipe.fingerprint[:63]
    assert metadata["annotations"]["mlpipes.io/fingerprint"] == job.recipe.fingerprint
    assert metadata["annotations"]["mlpipes.io/folder"] == str(job.folder.path)


def test_a_queue_suspends_a_job_until_it_is_admitted(tmp_path: Path) -> None:
    made = manifest(tmp_path, queue="training", queue_priority="low")
    assert made["spec"]["suspend"] is True
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
    assert made["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "low"
    (group,) = made["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 2, "a gang"


@pytest.mark.parametrize(("queue", "first"), [(None, 1), ("training", 2)])
def test_an_elastic_job_begins_with_its_least_workers_but_not_in_a_queue(
    tmp_path: Path, queue: str | None, first: int
) -> None:
    job = job_in(tmp_path).model_copy(update={"min_workers": 1})
    attempt = Attempt("digits-w2-13c6ba78", 1, tmp_path / "a1.json", {}, training(job))
    (group,) = ray_job(attempt, W2, settings(queue=queue))["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (first, first, 2)


def test_workers_go_to_the_spot_pool_and_heads_do_not(tmp_path: Path) -> None:
    spot = {"node_selector": {"pool": "spot"}, "tolerations": [{"key": "spot", "operator": "Exists"}]}
    made = manifest(tmp_path, node_selector={"zone": "a"}, spot=spot)
    head, worker = template(made, "head")["spec"], template(made, "worker")["spec"]
    assert head["nodeSelector"] == {"zone": "a"}
    assert worker["nodeSelector"] == {"zone": "a", "pool": "spot"}
    assert {"key": "spot", "operator": "Exists"} in worker["tolerations"]
    assert {"key": "spot", "operator": "Exists"} not in head["tolerations"]


def test_workers_get_gpus_memory_and_what_a_site_gives_them(tmp_path: Path) -> None:
    made = manifest(
        tmp_path,
        RayScaleConfig.from_key("w4-b128-e1-g0.5"),
        gpu_resource="amd.com/gpu",
        memory_per_worker="8Gi",
        placement="spread",
        environment={"NCCL_SOCKET_IFNAME": "eth0", "TOKEN": {"secret": "mine", "key": "token"}, "HOME": "/shared/me"},
        environment_from=["all"],
        image_pull_secrets=["registry"],
        volumes=[{"name": "data", "emptyDir": {}}],
        mounts=[{"name": "data", "mountPath": "/data"}],
    )
    spec = template(made, "worker")["spec"]
    (container,) = spec["containers"]
    assert container["resources"]["limits"] == {"memory": "16Gi", "amd.com/gpu": "1"}
    assert container["resources"]["requests"]["cpu"] == "2"
    reference = {"secretKeyRef": {"name": "mine", "key": "token"}}
    assert {"name": "TOKEN", "valueFrom": reference} in container["env"]
    assert [v["value"] for v in container["env"] if v["name"] == "HOME"] == ["/shared/me"]
    assert container["envFrom"] == [{"secretRef": {"name": "all"}}]
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert "podAntiAffinity" in spec["affinity"]
    (group,) = made["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["rayStartParams"]["num-gpus"]) == (2, "1")
    head = template(made, "head")["spec"]["containers"][0]
    assert "amd.com/gpu" not in head["resources"]["limits"]


def test_patches_are_merged_by_name() -> None:
    base = {"a": 1, "c": [{"name": "ray", "env": [{"name": "A", "value": "1"}]}], "l": [1]}
    patch = {"c": [{"name": "ray", "env": [{"name": "B"}], "tty": True}, {"name": "side"}], "l": [2]}
    assert merged(base, patch) == {
        "a": 1,
        "c": [{"name": "ray", "env": [{"name": "A", "value": "1"}, {"name": "B"}], "tty": True}, {"name": "side"}],
        "l": [2],
    }
    assert base["l"] == [1]


# -- how a job stands -------------------------------------------------------------------------------------------------
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


def test_a_videos_pods_have_nothing_to_save_and_its_driver_reserves_nothing(tmp_path: Path) -> None:
    scale = RayScaleConfig.from_key("w1-b1-e1-g0")
    subject = Subject("video", "f" * 64, JobFolder(tmp_path / "v"), str(tmp_path), "", "mlpipes.video.places", False)
    spec = ray_job(Attempt("video-1", 2, tmp_path / "a2.json", {}, subject), scale, settings())["spec"]
    assert spec["entrypoint"] == f"exec python -m mlpipes.video.places {tmp_path}/a2.json video-1-a2"
    assert "entrypointNumCpus" not in spec
    for group in (spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert "lifecycle" not in pod["containers"][0]
        assert pod["terminationGracePeriodSeconds"] < 30


def test_links_into_and_out_of_what_pods_mount_are_told(tmp_path: Path) -> None:
    shared, elsewhere = tmp_path / "shared", tmp_path / "elsewhere"
    for folder in (shared, elsewhere):
        folder.mkdir()
        (folder / "x.mp4").touch()
    (shared / "out.mp4").symlink_to(elsewhere / "x.mp4")
    (elsewhere / "into.mp4").symlink_to(shared / "x.mp4")
    mine = settings(store={"claim": "store", "mount_path": str(shared)})
    mine.check_visible(shared / "x.mp4")
    for link in (shared / "out.mp4", elsewhere / "into.mp4"):
        with pytest.raises(ConfigError, match="pods do not see"):
            mine.check_visible(link)


def test_a_file_that_pods_do_not_see_is_told_before_a_job_is_made() -> None:
    settings().check_visible(Path(settings().store.mount_path) / "videos" / "x.mp4")
    with pytest.raises(ConfigError, match=r"pods do not see /elsewhere/x.mp4: they mount /"):
        settings().check_visible(Path("/elsewhere/x.mp4"))


@pytest.mark.parametrize(
    ("run", "status", "ended", "has_result", "deleted"),
    [
        ("over", "Running", 0, False, False),
        ("over", "Running", 0, True, True),
        ("over", "Complete", 10, False, True),
        ("goes-on", "Complete", 10, True, False),
        ("", "Running", 0, True, False),  # a video of the command line, delivered once before
        ("", "Failed", 10, False, False),  # whoever asked for it looks once a second or so, and goes on
        ("", "Failed", 4000, False, True),
    ],
)
def test_what_is_tidied_up(
    run: str,
    status: str,
    ended: int,
    has_result: bool,
    deleted: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if has_result:
        (tmp_path / "result.json").touch()
    end = (datetime.now(UTC) - timedelta(seconds=ended)).isoformat()
    job = {
        "metadata": {"name": "j-a1", "annotations": {FOLDER_ANNOTATION: str(tmp_path), f"{PREFIX}/dagster-run": run}},
        "status": {"jobDeploymentStatus": status, "endTime": end},
    }
    gone: list[str] = []
    monkeypatch.setattr(KubernetesApi, "items", lambda api, path, **_: [job] if "rayjobs" in path else [])
    monkeypatch.setattr(KubernetesApi, "delete", lambda api, path, **_: gone.append(path))
    said = list(tidy(settings(), str(tmp_path), lambda name: name == "goes-on"))
    assert [path.endswith("j-a1") for path in gone] == [True] * deleted
    assert len(said) == deleted


@pytest.mark.parametrize("followed", [True, False])
def test_pods_that_a_dead_node_holds_are_removed_whoever_follows(
    followed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotations = {FOLDER_ANNOTATION: str(tmp_path), f"{PREFIX}/dagster-run": "some"}
    job = {"metadata": {"name": "j-a1", "annotations": annotations}, "status": {"jobDeploymentStatus": "Running"}}

    def pod(name: str, job: str, ready: str, **metadata: str) -> dict[str, Any]:
        conditions = [{"type": "Ready", "status": ready}, {"type": "ContainersReady", "status": ready}]
        return {
            "metadata": {"name": name, "labels": {f"{PREFIX}/job": job}, **metadata},
            "status": {"conditions": conditions},
        }

    now = datetime.now(UTC).isoformat()
    pods = [
        pod("dead", "j-a1", "Unknown", deletionTimestamp=now),
        pod("alive", "j-a1", "True"),
        pod("silent", "j-a1", "Unknown"),  # for a moment only, perhaps
        pod("ends", "j-a1", "True", deletionTimestamp=now),
        pod("other", "other-a1", "Unknown", deletionTimestamp=now),
    ]
    gone: list[str] = []
    monkeypatch.setattr(KubernetesApi, "items", lambda api, path, **_: [job] if "rayjobs" in path else pods)
    monkeypatch.setattr(KubernetesApi, "delete", lambda api, path, **_: gone.append(path.rpartition("/")[2]))
    (said,) = tidy(settings(), str(tmp_path), lambda _: followed)
    assert gone == ["dead"]
    assert said == "pod dead of RayJob j-a1 was held by a node that does not answer: removed"


def test_workers_wait_for_their_head_before_they_start_ray(tmp_path: Path) -> None:
    """KubeRay puts a container's command before its own."""
    made = manifest(tmp_path, python=sys.executable)
    assert "command" not in template(made, "head")["spec"]["containers"][0]
    (command,) = template(made, "worker")["spec"]["containers"][0]["command"]
    port, began = free_port(), tmp_path / "began"
    environment = os.environ | {"FQ_RAY_IP": "127.0.0.1", "RAY_PORT": str(port)}
    for ends in (True, False):
        shell = subprocess.Popen(["bash", "-c", "--", f"{command} && touch {began}"], env=environment)
        assert not began.exists()
        if ends:  # a pod that is told to go meanwhile
            until(lambda shell=shell: psutil.Process(shell.pid).children(), "it asks for the head")
            shell.terminate()
            assert shell.wait(60) == 143
        else:
            with socket.create_server(("127.0.0.1", port)):
                assert shell.wait(60) == 0
    assert began.exists()
