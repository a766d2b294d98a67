"""A training on the test cluster, and the Dagster runs that ask for it; its reference in one process."""

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

from mlpipes.scales import RayScaleConfig
from mlpipes.store.files import read_record
from mlpipes.store.layout import Store, TrainingFolder
from mlpipes.store.messages import Started, read_messages
from mlpipes.store.recipe import Recipe
from mlpipes_tests import evidence
from mlpipes_tests.barriers import HASTE, Barriers, haste
from mlpipes_tests.cluster import software
from mlpipes_tests.cluster.cluster import Cluster
from mlpipes_tests.cluster.conftest import Namespace
from mlpipes_tests.cluster.images import THIN
from mlpipes_tests.cluster.kubectl import Manifest
from mlpipes_tests.held import REFERENCE
from mlpipes_tests.sandbox import CHECKOUT
from mlpipes_tests.training.harness import make_job, run_here
from mlpipes_tests.waiting import LIMIT_SECONDS, until

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


def workers_of(folder: TrainingFolder) -> list[int]:
    """With how many workers it trained, one number for each time that it was resized."""
    found = [message.workers for message in read_messages(folder.messages(1))[0] if isinstance(message, Started)]
    return [number for number, before in zip(found, [0, *found], strict=False) if number != before]


def cancel(training: Training, run: "subprocess.Popen[bytes]") -> None:
    """Cancel a run, as Dagster's code server does."""
    with dg.DagsterInstance.local_temp(str(training.instance)) as instance:
        (record,) = instance.get_runs()
        instance.report_run_canceling(record)
    run.send_signal(signal.SIGINT)
