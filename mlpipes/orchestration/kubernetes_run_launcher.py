"""The run launcher on Kubernetes: dagster-k8s', with a health check that an API server may be away from."""

import time
from collections.abc import Mapping
from typing import Any

import dagster as dg
from dagster._core.launcher.base import CheckRunHealthResult, LaunchRunContext, WorkerStatus
from dagster_k8s import K8sRunLauncher
from dagster_k8s.job import get_job_name_from_run_id

AWAY_SECONDS = 600.0
"""For so long nothing is concluded from an API server that does not answer: meanwhile the run's pod works on."""
_LISTED_SECONDS = 2.0
"""Run monitoring checks all runs in one go: they share a list."""
_ASKED_SECONDS = 120.0
"""Who was not asked for so long may have answered meanwhile."""
_RUN_WORKERS = "app.kubernetes.io/component=run_worker"
_UNFINISHED = (dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.CANCELING)


class PatientK8sRunLauncher(K8sRunLauncher):
    """A Kubernetes Job a run, as dagster-k8s makes them; but what the API server does not tell is not held against a run.

    dagster-k8s takes any error of the API server for UNKNOWN, by which run monitoring fails the run while its pod works on,
    and asks for each run by itself. Here one list a poll answers for all runs. A run whose Job is gone, or has ended without
    the run's end, is failed, and retried by `run_retries`: the retry attaches to the training, which never noticed.
    Use it with `max_resume_run_attempts: 0`: a resumed run would count its steps as done that were not.
    """

    _listed: tuple[float, str, Mapping[str, Any]] | None = None
    _away: tuple[float, float] | None = None
    """Since when the API server has not answered, and when it did not last."""

    def launch_run(self, context: LaunchRunContext) -> None:
        """Launch a run, whose Job goes when the ConfigMap with the instance's settings does, as a Helm release's do."""
        super().launch_run(context)
        run = context.dagster_run
        namespace = self.get_container_context_for_run(run).namespace or self.job_namespace
        name = get_job_name_from_run_id(run.run_id)
        try:
            found: Any = self._api_client.core_api.read_namespaced_config_map(self.instance_config_map, namespace)
            owner = {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "name": self.instance_config_map,
                "uid": found.metadata.uid,
            }
            self._api_client.batch_api.patch_namespaced_job(name, namespace, {"metadata": {"ownerReferences": [owner]}})
        except Exception as error:  # the run works on all the same, and its Job goes a day after it has ended
            self._instance.report_engine_event(f"Job {name} is not owned by {self.instance_config_map}: {error}", run)

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """How the Job of a run stands."""
        namespace = self.get_container_context_for_run(run).namespace or self.job_namespace
        try:
            jobs = self._run_workers(namespace)
        except Exception as error:  # whatever a network, a proxy or the client's own code makes of it
            away = self._away_seconds()
            status = WorkerStatus.RUNNING if away < AWAY_SECONDS else WorkerStatus.UNKNOWN
            return CheckRunHealthResult(status, f"the API server has not answered for {away:.0f} s: {error}")
        name = get_job_name_from_run_id(run.run_id)
        job = jobs.get(name)
        if job is None:
            return CheckRunHealthResult(WorkerStatus.NOT_FOUND, f"Job {name} is gone from namespace {namespace}")
        if job.active or not (job.failed or job.succeeded):
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        ended = "failed" if job.failed else "ended"
        return CheckRunHealthResult(WorkerStatus.FAILED, f"Job {name} has {ended}, and the run has not")

    def _run_workers(self, namespace: str) -> Mapping[str, Any]:
        """The status of each Job of a run, by its name."""
        now = time.monotonic()
        if self._listed is None or self._listed[1] != namespace or now - self._listed[0] > _LISTED_SECONDS:
            found: Any = self._api_client.batch_api.list_namespaced_job(
                namespace, label_selector=_RUN_WORKERS, _request_timeout=10
            )
            self._listed, self._away = (now, namespace, {job.metadata.name: job.status for job in found.items}), None
        return self._listed[2]

    def _away_seconds(self) -> float:
        """How long the API server has not answered, now that it does not. Nobody asks it while there are no runs."""
        now = time.monotonic()
        since, last = self._away or (now, now)
        self._away = (since if now - last < _ASKED_SECONDS else now, now)
        return now - self._away[0]

    def get_run_worker_debug_info(self, run: dg.DagsterRun, include_container_logs: bool | None = True) -> str | None:
        """What is known of a run's pods. Of a run that is given up before it began or while it is cancelled, the Job goes.

        Run monitoring asks for this right before it gives such a run up; its pod would start late, or never, and hold what
        it asked for.
        """
        known = super().get_run_worker_debug_info(run, include_container_logs)
        if run.status in _UNFINISHED:
            namespace = self.get_container_context_for_run(run).namespace or self.job_namespace
            self._api_client.delete_job(job_name=get_job_name_from_run_id(run.run_id), namespace=namespace)
        return known
