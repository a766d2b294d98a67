"""Kubernetes, a real one with two nodes on this machine: the same bits as locally, every fault survived, nothing left."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from mlpipes.compute.kubernetes_settings import KubernetesSettings
from mlpipes.compute.kubernetes_tidy import tidy
from mlpipes.scales import RayScaleConfig
from mlpipes.store.claims import claimed
from mlpipes.store.files import read_record
from mlpipes.store.layout import Store, TrainingFolder
from mlpipes.store.messages import Resumed, Started, Stopping, read_messages
from mlpipes.store.recipe import Recipe
from mlpipes_tests import evidence
from mlpipes_tests.barriers import HASTE, Barriers, haste
from mlpipes_tests.cluster import conftest, software
from mlpipes_tests.cluster.cluster import Cluster
from mlpipes_tests.cluster.conftest import Namespace
from mlpipes_tests.cluster.images import THIN
from mlpipes_tests.cluster.kubectl import Manifest
from mlpipes_tests.held import REFERENCE
from mlpipes_tests.sandbox import CHECKOUT
from mlpipes_tests.training.harness import make_job, run_here
from mlpipes_tests.waiting import LIMIT_SECONDS, until

pytestmark = pytest.mark.cluster
cluster, namespace = conftest.cluster, conftest.namespace
ONE, TWO = "w1-b128-e12-g0", "w2-b128-e12-g0"
EARLY, LATE = 0.4, 0.7
"""Where the trainings wait."""
OURS = "rayjobs,rayclusters,pods,services,secrets,configmaps,jobs,workloads.kueue.x-k8s.io"
"""Kinds of which a training may leave nothing."""
_USER = 1000
"""Of the pods, and of whoever follows them: one user writes one store."""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of the same training, uninterrupted, in one process, without Ray and Kubernetes."""
    return run_here(make_job(tmp_path_factory.mktemp("reference"), ONE, REFERENCE))


class Training:
    """A scale's training on Kubernetes, and the Dagster runs that ask for it."""

    kinds = OURS

    def __init__(self, cluster: Cluster, namespace: Namespace, scale: str, **settings: Any) -> None:
        self.cluster, self.namespace, self.scale, self.runs = cluster, namespace, scale, 0
        self.home, self.kubectl = namespace.store / "home", cluster.kubectl
        self.logs, self.instance = namespace.store, self.home / "instance"
        self.home.mkdir()
        self.home.chmod(0o777)
        self.store, self.barriers = Store(self.home / "store"), Barriers(self.home)
        self.barriers.folder.mkdir()
        self.barriers.folder.chmod(0o777)
        evidence.collect_from(namespace.store)
        self.before = self.things()
        self.settings = {
            "namespace": namespace.name,
            "image": THIN,
            "image_pull_policy": "IfNotPresent",
            "store": {"claim": "store", "mount_path": str(namespace.store)},
            "volumes": [volume for volume in software.volumes() if volume["name"] != "store"],
            "mounts": [mount for mount in software.mounts() if mount["name"] != "store"],
            "environment": {**software.environment(), "PYTHONPATH": str(CHECKOUT), HASTE: str(haste())},
            "python": sys.executable,
            "run_as_user": _USER,
            "head_cpu": "100m",
            "cpu_per_worker": "300m",
            "memory_per_worker": "3Gi",
            "poll_seconds": 1,
            "save_seconds": 60,
            "node_lost_seconds": 5,
        }
        self.change(**settings)

    def change(self, **changes: Any) -> None:
        """Change the cluster's settings."""
        self.settings |= changes
        self.file.write_text(yaml.safe_dump(self.settings))

    @property
    def file(self) -> Path:
        return self.namespace.store / "kubernetes.yaml"

    @property
    def environment(self) -> dict[str, str]:
        """Of whoever asks for it."""
        mine = {"MLPIPES_KUBERNETES": self.file, "MLPIPES_HOME": self.home, "KUBECONFIG": self.cluster.kubeconfig}
        return os.environ | {name: str(value) for name, value in mine.items()} | {"HOME": str(self.home)}

    def run(self, **settings: Any) -> "subprocess.Popen[bytes]":
        """Start a Dagster run, with settings of the launchpad, in a process of its own, as the user that the pods are."""
        self.runs += 1
        step = [sys.executable, "-m", "mlpipes_tests.held_step", self.scale, str(self.instance)]
        step += [json.dumps(settings)] * bool(settings)
        with self.log_file.open("wb") as log:
            return subprocess.Popen([*as_user(), *step], cwd=CHECKOUT, env=self.environment, stdout=log, stderr=log)

    @property
    def log_file(self) -> Path:
        return self.logs / f"run{self.runs}.log"

    def log(self, run: int = 0) -> str:
        """What a run printed; the latest one if no number is given."""
        return (self.logs / f"run{run or self.runs}.log").read_text()

    def job(self) -> str:
        """The RayJob that the latest run follows."""
        return re.findall(r"(?:Submitted|Attached to) RayJob (\S+)", self.log())[-1]

    def folder(self, scale: str | None = None) -> TrainingFolder:
        """Of the training at a scale; of the latest run's if none is named."""
        there = [TrainingFolder(path) for path in self.store.root.glob("trainings/*/")]
        wanted = RayScaleConfig.from_key(scale or self.scale)
        (found,) = [each for each in there if Recipe.model_validate(read_record(each.recipe)).scale == wanted]
        return found

    def in_vain(self) -> str:
        """Why waiting for anything is in vain; empty if it is not."""
        if died := self.cluster.died():
            return died
        said = self.log()
        refused = "Nothing was started." in said or ("Traceback" in said and "Interrupted" not in said)
        return said[-3000:] if refused else ""

    def until(self, condition: Any, what: str) -> None:
        """Wait for something to be so."""
        until(condition, what, vain=self.in_vain, every=0.5)

    def until_barrier(self, place: float) -> None:
        """Wait until the training waits at a barrier."""
        self.barriers.wait_for(place, vain=self.in_vain)

    def until_said(self, text: str) -> None:
        """Wait until the latest run's log says something."""
        self.until(lambda: text in self.log(), f"the run says {text!r}")

    def until_attempt(self, attempt: int) -> None:
        """Wait until an attempt trains."""
        self.until(lambda: started(self.folder(), attempt), f"attempt {attempt} trains")

    def end(self, run: "subprocess.Popen[bytes]") -> int:
        """Wait for a run's end."""
        try:
            return run.wait(LIMIT_SECONDS)
        finally:
            run.kill()
            run.wait()

    def outcome(self) -> dict[str, Any]:
        return json.loads(self.folder().result.read_text())["content"]

    def pods(self, role: str) -> list[Manifest]:
        """Its pods of a role that are not being deleted."""
        found = self.kubectl.objects("pods", self.namespace.name, selector=f"ray.io/node-type={role}")
        return [pod for pod in found if not pod["metadata"].get("deletionTimestamp")]

    def things(self) -> set[str]:
        """What there is of the kinds that a training has anything of."""
        listed = self.kubectl(
            "get", self.kinds, f"--namespace={self.namespace.name}", "--ignore-not-found", "--output=name"
        )
        return set(listed.split())

    def assert_nothing_is_left(self) -> None:
        self.until(lambda: self.things() <= self.before, f"nothing is left but {self.before}")


def as_user() -> list[str]:
    """What has a command run as the pods' user; it may look into the test's folders, which are root's alone."""
    user = ["setpriv", f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups"]
    return [*user, "--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"]


def started(folder: TrainingFolder, attempt: int, times: int = 1) -> bool:
    """Whether an attempt's workers have begun to train, so many times."""
    return sum(isinstance(message, Started) for message in read_messages(folder.messages(attempt))[0]) >= times


def assert_equal(outcome: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("weights_digest", "order_digest", "loss_digest", "steps", "best"):
        assert outcome[name] == expected[name], name
    print(f"weights digest {outcome['weights_digest']}, attempt {outcome['attempt']}")


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


def workers_of(folder: TrainingFolder) -> list[int]:
    """With how many workers it trained, one number for each time that it was resized."""
    found = [message.workers for message in read_messages(folder.messages(1))[0] if isinstance(message, Started)]
    return [number for number, before in zip(found, [0, *found], strict=False) if number != before]


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


def cancel(training: Training, run: "subprocess.Popen[bytes]") -> None:
    """Cancel a run, as Dagster's code server does."""
    with dg.DagsterInstance.local_temp(str(training.instance)) as instance:
        (record,) = instance.get_runs()
        instance.report_run_canceling(record)
    run.send_signal(signal.SIGINT)


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
    assert list(tidy(settings, store, lambda _: False)) == [], "it trains on"
    training.barriers.open()
    training.until(training.folder().result.is_file, "the result is there")
    assert list(tidy(settings, store, lambda _: True)) == [], "somebody sees it off"
    assert list(tidy(settings, "/another/store", lambda _: False)) == []
    training.until(lambda: list(tidy(settings, store, lambda _: False)), "it is tidied up")
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
