"""Dagster's runs as Jobs on a real Kubernetes: an API server that is away is held against none, and what is gone is told."""

import json
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.launcher import LaunchRunContext, WorkerStatus
from dagster._core.test_utils import create_run_for_test
from dagster_k8s.job import get_job_name_from_run_id

from mlpipes.orchestration import kubernetes_run_launcher
from mlpipes.orchestration.kubernetes_run_launcher import PatientK8sRunLauncher
from mlpipes_tests.cluster import conftest, software
from mlpipes_tests.cluster.cluster import Cluster
from mlpipes_tests.cluster.conftest import Namespace
from mlpipes_tests.cluster.images import THIN
from mlpipes_tests.cluster.waiting_job import waiting
from mlpipes_tests.sandbox import CHECKOUT
from mlpipes_tests.waiting import until

pytestmark = pytest.mark.cluster
cluster, namespace = conftest.cluster, conftest.namespace


class Desk:
    """A Dagster instance on the shared store, whose runs are Jobs."""

    def __init__(self, cluster: Cluster, namespace: Namespace) -> None:
        self.cluster, self.namespace, self.gate = cluster, namespace, namespace.store / "go"
        home = namespace.store / "dagster"
        home.mkdir()
        settings = {
            "storage": {"sqlite": {"base_dir": str(home)}},
            "compute_logs": {
                "module": "dagster._core.storage.noop_compute_log_manager",
                "class": "NoOpComputeLogManager",
            },
            "telemetry": {"enabled": False},
            "run_launcher": {
                "module": PatientK8sRunLauncher.__module__,
                "class": PatientK8sRunLauncher.__name__,
                "config": self._launcher(),
            },
        }
        (home / "dagster.yaml").write_text(yaml.safe_dump(settings))
        self.instance = dg.DagsterInstance.from_config(str(home))
        launcher = self.instance.run_launcher
        assert isinstance(launcher, PatientK8sRunLauncher)
        self.launcher = launcher

    def _launcher(self) -> dict[str, Any]:
        name, store = "dagster-instance", str(self.namespace.store)
        mine = {"name": name, "namespace": self.namespace.name}
        self.cluster.kubectl.apply(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": mine, "data": {"dagster.yaml": "{}"}}
        )
        (container,) = software.pod_spec([])["containers"]
        # The store at the path that it has here: run and daemon share one instance.
        mounts = [m | ({"mountPath": store} if m["name"] == "store" else {}) for m in container["volumeMounts"]]
        return {
            "service_account_name": "default",
            "instance_config_map": name,
            "dagster_home": "/tmp/dagster",
            "job_image": THIN,
            "image_pull_policy": "IfNotPresent",
            "job_namespace": self.namespace.name,
            "load_incluster_config": False,
            "kubeconfig_file": str(self.cluster.kubeconfig),
            "volumes": software.volumes(),
            "volume_mounts": mounts,
            "run_k8s_config": {
                "container_config": {
                    "command": ["/usr/bin/env"],  # a Job has arguments only, and the thin image's own is a shell
                    "security_context": container["securityContext"],
                    "env": [*container["env"], {"name": "PYTHONPATH", "value": str(CHECKOUT)}],
                },
            },
        }

    def launch(self, **resources: str) -> dg.DagsterRun:
        """A run whose pod wants such resources."""
        container = {"resources": {"requests": resources or {"cpu": "100m"}}}
        run = create_run_for_test(
            self.instance,
            "waiting",
            run_config={"ops": {"waits": {"config": str(self.gate)}}},
            job_code_origin=dg.reconstructable(waiting).get_python_origin(),
            status=dg.DagsterRunStatus.STARTING,
            tags={"dagster-k8s/config": json.dumps({"container_config": container})},
        )
        self.launcher.launch_run(LaunchRunContext(run, workspace=None))
        # SQLite makes files for their owner alone, whatever the umask; the pod is another user.
        for path in (home := self.namespace.store / "dagster", *home.rglob("*")):
            path.chmod(0o777)
        return run

    def in_vain(self) -> str:
        """Why waiting for a pod to work is in vain; empty if it is not."""
        label = "--selector=app.kubernetes.io/component=run_worker"
        failed = self.cluster.kubectl(
            "get",
            "pods",
            f"--namespace={self.namespace.name}",
            label,
            "--field-selector=status.phase=Failed",
            "-o=name",
        )
        words = [self.cluster.kubectl.logs(pod, namespace=self.namespace.name)[-2000:] for pod in failed.split()]
        return self.cluster.died() or "\n".join(words)

    def now(self, run: dg.DagsterRun) -> dg.DagsterRun:
        found = self.instance.get_run_by_id(run.run_id)
        assert found is not None
        return found

    def until_started(self, run: dg.DagsterRun) -> None:
        started = dg.DagsterRunStatus.STARTED
        until(lambda: self.now(run).status == started, "the run's pod works", vain=self.in_vain, every=0.5)

    def health(self, run: dg.DagsterRun) -> tuple[WorkerStatus, str]:
        found = self.launcher.check_run_worker_health(self.now(run))
        return found.status, found.msg or ""

    def until_health(self, run: dg.DagsterRun, status: WorkerStatus) -> str:
        until(lambda: self.health(run)[0] == status, f"the run's worker is {status}", every=0.5)
        return self.health(run)[1]

    def job(self, run: dg.DagsterRun) -> Any:
        return self.cluster.kubectl.find("job", get_job_name_from_run_id(run.run_id), self.namespace.name)


@pytest.fixture
def desk(cluster: Cluster, namespace: Namespace) -> Desk:
    return Desk(cluster, namespace)


def test_an_api_server_that_is_away_is_held_against_no_run(
    cluster: Cluster, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [desk.launch(), desk.launch()]
    for run in runs:
        desk.until_started(run)
        assert desk.health(run) == (WorkerStatus.RUNNING, "")
    cluster.kill_program("apiserver")
    monkeypatch.setattr(kubernetes_run_launcher, "_LISTED_SECONDS", 0.0)
    for run in runs:
        status, said = desk.health(run)
        assert status == WorkerStatus.RUNNING
        assert "the API server has not answered for" in said
    with monkeypatch.context() as patch:
        patch.setattr(kubernetes_run_launcher, "AWAY_SECONDS", 0.0)
        assert desk.health(runs[0])[0] == WorkerStatus.UNKNOWN
    cluster.start_program("apiserver")
    cluster.wait_for_api()
    for run in runs:
        assert desk.health(run) == (WorkerStatus.RUNNING, "")
    desk.gate.touch()
    for run in runs:
        until(lambda run=run: desk.now(run).is_finished, "the run ends", vain=cluster.died, every=0.5)
        assert desk.now(run).status == dg.DagsterRunStatus.SUCCESS


def test_a_run_whose_pod_or_job_is_gone_is_told(cluster: Cluster, desk: Desk, namespace: Namespace) -> None:
    killed, deleted = desk.launch(), desk.launch()
    for run in (killed, deleted):
        desk.until_started(run)
    label = f"job-name={get_job_name_from_run_id(killed.run_id)}"
    cluster.kubectl(
        "delete", "pod", f"--namespace={namespace.name}", f"--selector={label}", "--grace-period=0", "--force"
    )
    assert "has failed, and the run has not" in desk.until_health(killed, WorkerStatus.FAILED)
    name = get_job_name_from_run_id(deleted.run_id)
    cluster.kubectl("delete", "job", name, f"--namespace={namespace.name}")
    assert f"Job {name} is gone" in desk.until_health(deleted, WorkerStatus.NOT_FOUND)


def test_a_runs_job_goes_with_the_settings_of_its_instance(cluster: Cluster, desk: Desk, namespace: Namespace) -> None:
    run = desk.launch()
    desk.until_started(run)
    cluster.kubectl("delete", "configmap", "dagster-instance", f"--namespace={namespace.name}")
    until(lambda: desk.job(run) is None, "its Job is gone", every=0.5)


def test_one_list_answers_for_all_runs(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, asked = [desk.launch() for _ in range(3)], []
    api = desk.launcher._api_client.batch_api
    listing = api.list_namespaced_job
    monkeypatch.setattr(api, "list_namespaced_job", lambda *a, **o: (asked.append(a), listing(*a, **o))[1])
    monkeypatch.setattr(kubernetes_run_launcher, "_LISTED_SECONDS", 3600.0)
    assert {desk.health(run)[0] for run in runs} == {WorkerStatus.RUNNING}
    assert len(asked) == 1
    desk.gate.touch()


def test_of_a_run_that_is_given_up_before_it_began_nothing_is_left(desk: Desk) -> None:
    """Run monitoring asks for what is known right before it gives a run up."""
    run = desk.launch(cpu="1000")
    until(lambda: desk.job(run) is not None, "its Job is there")
    known = desk.launcher.get_run_worker_debug_info(desk.now(run))
    assert known is not None
    assert "Insufficient cpu" in known or "Pending" in known
    until(lambda: desk.job(run) is None, "its Job is gone", every=0.5)
