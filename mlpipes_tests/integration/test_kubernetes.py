"""Kubernetes, a real one with two nodes on this machine: the same bits as locally, every fault survived, nothing left."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlpipes.compute.kubernetes_settings import KubernetesSettings
from mlpipes.compute.kubernetes_tidy import Wanted, tidy
from mlpipes.store.claims import claimed
from mlpipes.store.messages import Resumed, Stopping, read_messages
from mlpipes_tests.cluster import conftest, trainings
from mlpipes_tests.cluster.cluster import Cluster
from mlpipes_tests.cluster.conftest import Namespace
from mlpipes_tests.cluster.trainings import (
    EARLY,
    LATE,
    ONE,
    TWO,
    Training,
    as_user,
    assert_equal,
    cancel,
    started,
    workers_of,
)
from mlpipes_tests.sandbox import CHECKOUT

pytestmark = pytest.mark.cluster
cluster, namespace, expected = conftest.cluster, conftest.namespace, trainings.expected


@pytest.mark.parametrize("scale", [ONE, TWO])
def test_pods_end_in_the_model_of_the_local_run(
    cluster: Cluster,
    namespace: Namespace,
    expected: dict[str, Any],
    scale: str,
) -> None:
    training = Training(cluster, namespace, scale)
    assert training.end(training.run()) == 0, training.log()[-5000:]
    assert_equal(training.outcome(), expected)
    assert training.outcome()["attempt"] == 1
    assert re.fullmatch(rf"digits-{scale}-[0-9a-f]{{8}}-a1", training.job())
    assert "pods are ready" in training.log(), "what it waited for was said"
    assert training.folder().log(1).is_file()
    training.assert_nothing_is_left()


def test_worker_and_head_pods_that_go_are_replaced(
    cluster: Cluster,
    namespace: Namespace,
    expected: dict[str, Any],
) -> None:
    training = Training(cluster, namespace, TWO)
    training.barriers.close(EARLY, LATE)
    run = training.run()
    training.until_barrier(EARLY)
    worker = training.pods("worker")[0]["metadata"]["name"]
    training.kubectl("delete", "pod", worker, f"--namespace={namespace.name}", "--grace-period=0", "--force")
    training.until(lambda: started(training.folder(), 1, times=2), "other workers train")
    training.barriers.open(EARLY)

    training.until_barrier(LATE)
    head = training.pods("head")[0]["metadata"]["name"]
    training.kubectl("delete", "pod", head, f"--namespace={namespace.name}", "--grace-period=0", "--force")
    training.until_attempt(2)
    training.barriers.open()
    assert training.end(run) == 0, training.log()[-5000:]
    assert "is back in its queue, for attempt 2" in training.log()
    assert_equal(training.outcome(), expected)
    assert training.outcome()["attempt"] == 2
    assert claimed(training.folder(), training.job()) == 2, "by the same RayJob"
    assert training.job().endswith("-a1")
    training.assert_nothing_is_left()


def test_a_pod_that_is_told_to_go_saves_first(
    cluster: Cluster,
    namespace: Namespace,
    expected: dict[str, Any],
) -> None:
    training = Training(cluster, namespace, TWO)
    training.barriers.close(EARLY)
    run = training.run()
    training.until_barrier(EARLY)
    worker = training.pods("worker")[0]["metadata"]["name"]
    training.kubectl("delete", "pod", worker, f"--namespace={namespace.name}", "--wait=false")
    training.until(training.folder().stop_request(1).exists, "a last checkpoint is asked for")
    training.barriers.open()
    assert training.end(run) == 0, training.log()[-5000:]
    messages = read_messages(training.folder().messages(1))[0]
    stopped = [message.step for message in messages if isinstance(message, Stopping)]
    resumed = [message.step for message in messages if isinstance(message, Resumed)]
    assert stopped, "it was answered"
    assert resumed, "other workers went on"
    assert resumed[-1] >= stopped[0], "not a step before it was lost"
    assert_equal(training.outcome(), expected)
    training.assert_nothing_is_left()


def test_a_node_that_dies_is_replaced(
    cluster: Cluster,
    namespace: Namespace,
    expected: dict[str, Any],
) -> None:
    training = Training(cluster, namespace, TWO, placement="spread")
    training.barriers.close(EARLY)
    run = training.run()
    training.until_barrier(EARLY)
    head = training.pods("head")[0]["spec"]["nodeName"]
    nodes = {pod["spec"]["nodeName"] for pod in training.pods("worker")} - {head}
    assert nodes, "workers are spread"
    (node,) = nodes
    cluster.kill_node(node)
    try:
        training.until(lambda: started(training.folder(), 1, times=2), "workers on the other node train")
        training.barriers.open()
        assert training.end(run) == 0, training.log()[-5000:]
        assert_equal(training.outcome(), expected)
        training.assert_nothing_is_left()
    finally:
        cluster.start_node(node)
        cluster.wait_until_ready(node)


def test_an_elastic_training_begins_with_the_workers_that_there_is_room_for(
    cluster: Cluster,
    namespace: Namespace,
    expected: dict[str, Any],
) -> None:
    apart = {"labelSelector": {"matchLabels": {"ray.io/node-type": "worker"}}, "topologyKey": "kubernetes.io/hostname"}
    alone = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}}
    training = Training(cluster, namespace, TWO, worker_pod={"spec": {"affinity": alone}})
    training.barriers.close(EARLY, LATE)
    cluster.kubectl("cordon", "node-2")
    try:
        run = training.run(min_workers=1, resize_seconds=2)
        training.until_barrier(EARLY)
        training.until(lambda: len(training.pods("worker")) == 2, "it asks for the other one")
    finally:
        cluster.kubectl("uncordon", "node-2")
    training.barriers.open(EARLY)
    training.until_barrier(LATE)
    training.until(lambda: workers_of(training.folder()) == [1, 2], "it has taken in the other one")
    training.barriers.open()
    assert training.end(run) == 0, training.log()[-5000:]
    assert_equal(training.outcome(), expected)
    assert training.outcome()["attempt"] == 1
    training.assert_nothing_is_left()


def test_a_cancelled_run_leaves_nothing(cluster: Cluster, namespace: Namespace) -> None:
    training = Training(cluster, namespace, ONE)
    training.barriers.close(EARLY)
    run = training.run()
    training.until_barrier(EARLY)
    cancel(training, run)
    training.until(training.folder().stop_request(1).exists, "a last checkpoint is asked for")
    training.barriers.open()
    training.assert_nothing_is_left()
    training.end(run)
    messages = read_messages(training.folder().messages(1))[0]
    stopped = [message.step for message in messages if isinstance(message, Stopping)]
    kept = max(int(path.name.removeprefix("step-")) for path in training.folder().checkpoints.glob("step-*"))
    assert stopped, "a last checkpoint"
    assert kept >= stopped[0], "or what came after it, until the job was ended"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"queue": "nowhere"}, "there is no LocalQueue nowhere. `kubectl"),
        ({"store": {"claim": "nowhere"}}, "there is no PersistentVolumeClaim nowhere in namespace"),
        ({"namespace": "nowhere"}, "there is no PersistentVolumeClaim store in namespace nowhere"),
        ({"owner": "nowhere"}, "there is no ConfigMap nowhere. `kubectl"),
        ({"node_selector": {"pool": "nowhere"}}, "no node has the labels that workers ask for (pool=nowhere)"),
        ({"cpu_per_worker": "64"}, "no node fits: a worker pod wants 64 of cpu, the largest node has"),
        ({"memory_per_worker": "256Mi"}, "Raise `memory_per_worker` (it is 256Mi)"),
        ({"context": "nowhere"}, "Set KUBECONFIG to one that `kubectl` works with"),
        (
            {"image": "registry.invalid/none:1", "image_pull_policy": "Never"},
            "image cannot be pulled: registry.invalid",
        ),
        ({"environment_from": ["nowhere"]}, 'secret "nowhere" not found'),
        ({"volumes": [{"name": "x", "emptyDirr": {}}], "mounts": []}, 'unknown field "spec.rayClusterSpec.headGroup'),
        ({"worker_pod": {"spec": {"hostNetwork": True}}}, "violates PodSecurity"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_one_message_and_nothing_is_left(
    cluster: Cluster,
    namespace: Namespace,
    changes: dict[str, Any],
    said: str,
) -> None:
    training = Training(cluster, namespace, ONE)
    changes = {key: training.settings[key] | value if key == "store" else value for key, value in changes.items()}
    training.change(**changes)
    assert training.end(training.run()) == 1
    assert said in training.log(), training.log()[-3000:]
    training.assert_nothing_is_left()


def test_a_training_that_nobody_follows_to_its_end_is_tidied_up(
    cluster: Cluster, namespace: Namespace, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(cluster, namespace, ONE)
    training.barriers.close(EARLY)
    run = training.run()
    training.until_barrier(EARLY)
    run.kill()
    run.wait()
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    settings, store = KubernetesSettings.load(training.file), str(training.store.root)
    assert list(tidy(settings, store, lambda _: Wanted.NO_MORE)) == [], "it trains on"
    training.barriers.open()
    training.until(training.folder().result.is_file, "the result is there")
    assert list(tidy(settings, store, lambda _: Wanted.FOLLOWED)) == [], "somebody sees it off"
    assert list(tidy(settings, "/another/store", lambda _: Wanted.CANCELLED)) == []
    training.until(lambda: list(tidy(settings, store, lambda _: Wanted.NO_MORE)), "it is tidied up")
    training.assert_nothing_is_left()
    assert_equal(training.outcome(), expected)


def test_a_run_that_dies_attaches_again(cluster: Cluster, namespace: Namespace, expected: dict[str, Any]) -> None:
    training = Training(cluster, namespace, ONE)
    training.barriers.close(EARLY)
    run = training.run()
    training.until_barrier(EARLY)
    job = training.job()
    run.kill()
    run = training.run()
    training.until_said(f"Attached to RayJob {job}")
    training.barriers.open()
    assert training.end(run) == 0, training.log()[-5000:]
    assert_equal(training.outcome(), expected)
    assert training.outcome()["attempt"] == 1
    training.assert_nothing_is_left()


def test_the_doctor_says_what_is_there_and_what_is_missing(
    cluster: Cluster, namespace: Namespace, tmp_path: Path
) -> None:
    training = Training(cluster, namespace, ONE)
    (namespace.store / "scales.yaml").write_text("digits: [w1-b128-e3-g0, w1-b128-e3-g1]\n")

    def doctor(*options: str, **environment: str) -> tuple[int, str]:
        command = [str(Path(sys.executable).parent / "mlpipes"), "doctor", "kubernetes", *options]
        mine = {"MLPIPES_SCALES": str(namespace.store / "scales.yaml"), "COLUMNS": "300"} | environment
        done = subprocess.run(
            [*as_user(), *command], env=training.environment | mine, capture_output=True, text=True, cwd=CHECKOUT
        )
        return done.returncode, done.stdout + done.stderr

    code, said = doctor("--probe")
    assert code == 1, "no node has a GPU"
    assert re.search(r"missing +digits w1-b128-e3-g1: no node fits: a worker pod wants 1 of nvidia.com/gpu", said)
    for good in ("settings", "API server", "KubeRay", "rights", "store", "digits w1-b128-e3-g0", "a pod"):
        assert re.search(rf"good +{good}: ", said), said
    assert re.search(r"a pod: read here: .* torch \d", said), said
    training.assert_nothing_is_left()

    where = f"--namespace={namespace.name}"
    cluster.kubectl("create", "serviceaccount", "limited", where)
    token = cluster.kubectl("create", "token", "limited", where).strip()
    limited = json.loads(cluster.kubeconfig.read_text())
    limited["users"][0]["user"] = {"token": token}
    (tmp_path / "limited").write_text(json.dumps(limited))
    code, said = doctor(KUBECONFIG=str(tmp_path / "limited"))
    assert code == 1
    (create,) = re.findall(r"`kubectl (-n \S+ create role mlpipes [^`]+)`", said)
    cluster.kubectl(*create.split())
    account = f"--serviceaccount={namespace.name}:limited"
    cluster.kubectl("create", "rolebinding", "mlpipes", where, "--role=mlpipes", account)
    code, said = doctor(KUBECONFIG=str(tmp_path / "limited"))
    assert code == 0, said
    assert "the nodes are not for us to see" in said
    training.settings["imagee"] = "x"
    training.change()
    code, said = doctor()
    assert code == 1
    assert "imagee: Extra inputs are not permitted" in said
