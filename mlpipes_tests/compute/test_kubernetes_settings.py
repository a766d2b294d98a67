"""Kubernetes' settings: each mistake is named, and so is what pods do not see."""

from pathlib import Path

import pytest

from mlpipes.compute.kubernetes import KubernetesJobs
from mlpipes.compute.kubernetes_manifest import (
    Attempt,
    ray_job,
    training,
)
from mlpipes.compute.kubernetes_settings import KubernetesSettings
from mlpipes.compute.places import has_queue, jobs_for
from mlpipes.errors import ConfigError, ScaleError
from mlpipes_tests.compute.kubernetes_objects import LEAST, W2, settings, template, written
from mlpipes_tests.compute.test_jobs import job_in
from mlpipes_tests.sandbox import CHECKOUT

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
