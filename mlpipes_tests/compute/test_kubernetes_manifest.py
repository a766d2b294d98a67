"""The RayJob of a scale's training or a video: names, labels, pods, patches."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlpipes.compute.kubernetes import KubernetesJobs
from mlpipes.compute.kubernetes_manifest import (
    Attempt,
    Subject,
    label_value,
    ray_job,
    shape,
    training,
    training_name,
)
from mlpipes.compute.kubernetes_pods import merged
from mlpipes.scales import RayScaleConfig
from mlpipes.store.layout import JobFolder
from mlpipes_tests.compute.kubernetes_objects import (
    W2,
    manifest,
    settings,
    template,
)
from mlpipes_tests.compute.test_jobs import job_in
from mlpipes_tests.sandbox import free_port
from mlpipes_tests.waiting import until


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


def test_head_and_workers_agree_on_pings_and_workers_notice_another_head_in_seconds(tmp_path: Path) -> None:
    made = manifest(tmp_path)
    head, worker = (
        {v["name"]: v.get("value") for v in template(made, role)["spec"]["containers"][0]["env"]}
        for role in ("head", "worker")
    )
    for name in ("RAY_grpc_client_keepalive_time_ms", "RAY_grpc_client_keepalive_timeout_ms"):
        assert head[name] == worker[name] == "10000"
    assert worker["RAY_raylet_liveness_self_check_interval_ms"] == "2000"


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
