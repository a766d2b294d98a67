"""Kubernetes: a training as one RayJob of KubeRay; submitted, found again, followed, and deleted with nothing left.

What a training has achieved is told by the store alone: its heartbeat, its messages, and which attempt it has claimed. A
RayJob whose head is gone reads RUNNING for ever, and its operator may run the entry point again by itself.
"""

import shlex
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlpipes.compute.jobs import JobHandle, Jobs, JobState, JobStatus
from mlpipes.compute.kubernetes_api import KubernetesApi, RefusedError
from mlpipes.compute.kubernetes_manifest import (
    FOLDER_ANNOTATION,
    NAME_LABEL,
    PREFIX,
    Attempt,
    Subject,
    ray_job,
    shape,
    training,
    training_name,
)
from mlpipes.compute.kubernetes_queue import ahead, workload_of
from mlpipes.compute.kubernetes_reasons import DELETED, Look, silent_nodes, standing, terminating
from mlpipes.compute.kubernetes_settings import SETTINGS_VARIABLE, KubernetesSettings
from mlpipes.compute.kubernetes_watch import Watched
from mlpipes.errors import PreflightError
from mlpipes.scales import RayScaleConfig
from mlpipes.store.claims import claimed
from mlpipes.store.identity import identify
from mlpipes.store.layout import JobFolder, Store
from mlpipes.store.redaction import redact
from mlpipes.store.training_job import TrainingJob

_LATE_SECONDS = 10.0
"""What a kubelet gets beyond a pod's grace to say that the pod is gone."""
_REFUSAL_SECONDS = 10.0
"""How long a refusal must last: a queue that was just made is unknown to Kueue for a moment."""
_FORBIDDEN_SECONDS = 120.0
"""How long what was allowed before must be forbidden: an API server that has just started does not know all rights yet."""
_NO_NEWS = ("Unhealthy", "FailedToCreateRayCluster", "BackOff")
"""Warnings that say no more than that a pod is not ready yet, or, of the operator, that it looked too early."""
_LOG_LINES, _EVENTS = 400, 100


class KubernetesJobs(Jobs):
    """The RayJobs of one scale's trainings. A label carries the training's name, by which they are found again."""

    name = "RayJob"
    module = "mlpipes.compute.kubernetes_entry"
    doctor = "mlpipes doctor kubernetes"
    shares_machine = False

    def __init__(self, settings: KubernetesSettings, scale: RayScaleConfig, patience_seconds: float = 180) -> None:
        self.settings, self.scale = settings.of_scale(scale.key), scale
        self.api, self.python = KubernetesApi(self.settings, patience_seconds), self.settings.python
        self.poll_seconds = min(self.settings.poll_seconds, 1.0)  # of the store; the API server is asked less often
        self._folders: dict[str, JobFolder] = {}
        self._watched: dict[str, Watched] = {}
        self._refused: dict[str, float] = {}
        self._forbidden: dict[str, float] = {}
        self._leaving: dict[str, float] = {}
        self._grown: set[str] = set()

    @staticmethod
    def name_of(job: TrainingJob) -> str:
        """What people read, and a hash of the fingerprint and the store: a RayJob's name is short."""
        return training_name(Jobs.name_of(job), f"{job.recipe.workload}-{job.recipe.scale.key}")

    def check(self, scale: RayScaleConfig, data_bytes: int, min_workers: int | None = None) -> None:
        """Raises PreflightError if it is known beforehand that the cluster cannot hold a training of a scale."""
        from mlpipes.compute.kubernetes_doctor import preflight

        preflight(self.settings, scale, data_bytes, min_workers)

    # -- submitting and finding ----------------------------------------------------------------------------------------
    def latest(self, name: str) -> tuple[JobHandle, JobStatus] | None:
        """The latest RayJob of a training, and the attempt that it has come to."""
        jobs = self.api.items(self.api.ray_jobs(), labels=f"{NAME_LABEL}={_short(name)}")
        latest = max(jobs, key=_first_attempt, default=None)
        if latest is None:
            return None
        id, attempt = (
            latest["metadata"]["name"],
            max(_first_attempt(latest), claimed(_folder(latest), latest["metadata"]["name"])),
        )
        return JobHandle(id, attempt, attached=True), standing(Look(latest))

    def submit(
        self, name: str, specification: Path, attempt: int, environment: Mapping[str, str], about: str
    ) -> JobHandle:
        """Submit an attempt, or attach to it if somebody else has. Raises PreflightError if it is refused."""
        subject = self._subject(specification)
        self.settings.check_store(Path(subject.store))
        identify(Store(Path(subject.store)))  # by which its RayJobs are found again
        made = Attempt(_short(name), attempt, specification, environment, subject)
        try:
            manifest = ray_job(made, self.scale, self.settings, self._owner())
            self.api.request("POST", self.api.ray_jobs(), {"fieldValidation": "Strict"}, manifest)
        except RefusedError as error:
            if error.status == 409 and self._is_ours(made):
                return JobHandle(made.id, attempt, attached=True)
            if error.status == 404:
                raise PreflightError(
                    f"there is no namespace {self.settings.namespace}, or KubeRay is not installed: {error}. "
                    f"`{self.doctor}` says which"
                ) from error
            raise
        for earlier in self.api.items(self.api.ray_jobs(), labels=f"{NAME_LABEL}={made.name}"):
            if _first_attempt(earlier) < attempt:  # nobody has followed it to its end
                self.api.delete(self.api.ray_jobs(earlier["metadata"]["name"]))
        return JobHandle(made.id, attempt, attached=False)

    def _subject(self, specification: Path) -> Subject:
        """What an attempt makes, by its specification."""
        return training(TrainingJob.read(specification))

    def _owner(self) -> dict[str, str] | None:
        """What trainings are deleted with; never a pod or Job of a run, for they outlive it."""
        if self.settings.owner is None:
            return None
        found = self.api.find(self.api.core("configmaps", self.settings.owner))
        if found is None:
            raise PreflightError(
                f"there is no ConfigMap {self.settings.owner} in namespace {self.settings.namespace}, which trainings are "
                f"to be deleted with: make it, or leave `owner` out of the settings ({SETTINGS_VARIABLE})"
            )
        return {"apiVersion": "v1", "kind": "ConfigMap", "name": self.settings.owner, "uid": found["metadata"]["uid"]}

    def _is_ours(self, made: Attempt) -> bool:
        """Whether the RayJob that is there under an attempt's name is of the same training."""
        there = self.api.find(self.api.ray_jobs(made.id)) or {"metadata": {}}
        return there["metadata"].get("annotations", {}).get(FOLDER_ANNOTATION) == str(made.subject.folder.path)

    # -- following -----------------------------------------------------------------------------------------------------
    def status(self, handle: JobHandle) -> JobStatus:
        """How a job stands; REQUEUED if its entry point has claimed another attempt than the handle's.

        The API server is asked when something has happened to its pods, and seldom otherwise.
        """
        if requeued := self._requeued(handle):
            return requeued
        now, watched, grown = time.monotonic(), self._watched.get(handle.id), self._messages_bytes(handle)
        if watched is not None:
            if not watched.is_due(now, grown, self.api, handle.id, urgent=bool(self._leaving or self._refused)):
                return watched.status
            watched.about_to_ask()
        try:
            job = self.api.find(self.api.ray_jobs(handle.id))
            if job and handle.id not in self._folders:
                self._folders[handle.id] = _folder(job)
                if requeued := self._requeued(handle):
                    return requeued
            status = self._standing(handle, job) if job else self._gone()
        except RefusedError as error:
            since = self._forbidden.setdefault(handle.id, now)
            if watched is None or error.status != 403 or now - since > _FORBIDDEN_SECONDS:
                raise
            return watched.status
        self._forbidden.pop(handle.id, None)
        if watched is None:
            self._watched[handle.id] = Watched(self.settings.poll_seconds, now, status, grown)
        else:
            watched.learned(now, status, grown)
        return status

    def _requeued(self, handle: JobHandle) -> JobStatus | None:
        """That another attempt was claimed, as far as it is known where that is written."""
        folder = self._folders.get(handle.id)
        if folder is None or (current := claimed(folder, handle.id)) <= handle.attempt:
            return None
        self._unwatch(handle)
        return JobStatus(JobState.REQUEUED, "its entry point runs again", current)

    def _unwatch(self, handle: JobHandle) -> None:
        if watched := self._watched.pop(handle.id, None):
            watched.end()

    def _standing(self, handle: JobHandle, job: dict[str, Any]) -> JobStatus:
        status = standing(self._look(job))
        if status.state == JobState.STOPPED and self.settings.resubmit_deleted:
            return replace(status, state=JobState.LOST)
        if status.state != JobState.REFUSED:
            self._refused.pop(handle.id, None)
            if status.state == JobState.RUNNING:
                self._grow(job)
            return status
        since = self._refused.setdefault(handle.id, time.monotonic())
        return status if time.monotonic() - since > _REFUSAL_SECONDS else replace(status, state=JobState.PENDING)

    def _gone(self) -> JobStatus:
        return JobStatus(JobState.LOST if self.settings.resubmit_deleted else JobState.STOPPED, DELETED)

    def _look(self, job: dict[str, Any]) -> Look:
        """Look at a RayJob as closely as it takes to say why it stands as it does."""
        cluster, look = (
            (job.get("status") or {}).get("rayClusterName"),
            Look(job, gpu_resource=self.settings.gpu_resource),
        )
        if job["spec"].get("suspend") and (workload := workload_of(self.api, job)):
            look = replace(look, workload=workload, ahead=ahead(self.api, workload))
        if cluster:
            pods = self.api.items(self.api.core("pods"), labels=f"ray.io/cluster={cluster}")
            look = replace(look, pods=pods, dead=list(silent_nodes(pods)))
            self._bury(pods)
        else:
            self._leaving = {}
        if look.workload is None and standing(look).state in (JobState.PENDING, JobState.REFUSED):
            about = [job["metadata"]["name"], cluster, *(pod["metadata"]["name"] for pod in look.pods)]
            look = replace(look, events=self._warnings({name for name in about if name}), nodes=self._nodes(look))
        return look

    def _grow(self, job: dict[str, Any]) -> None:
        """Ask for the workers that an elastic training has begun without; it takes them in when they are there."""
        (group,), wanted = job["spec"]["rayClusterSpec"]["workerGroupSpecs"], shape(self.scale, self.settings).pods
        cluster = (job.get("status") or {}).get("rayClusterName")
        if group["replicas"] < wanted and cluster and cluster not in self._grown:
            try:
                self.api.replace(self.api.ray_clusters(cluster), "/spec/workerGroupSpecs/0/replicas", wanted)
            except RefusedError as error:
                if error.status not in (404, 409):
                    raise
                return  # it was replaced, or changed, meanwhile: at the next look
            self._grown.add(cluster)

    def _warnings(self, about: set[str]) -> list[dict[str, Any]]:
        """Warnings about things of these names, the latest last; none where we may not see events."""
        try:
            found = self.api.items(self.api.core("events"), fields="type=Warning")
        except RefusedError:
            return []
        mine = [e for e in found if e["involvedObject"].get("name") in about and e.get("reason") not in _NO_NEWS]
        return sorted(mine, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")[-_EVENTS:]

    def _nodes(self, look: Look) -> list[dict[str, Any]]:
        """The nodes, if a pod finds no place and we may see them."""
        if not any(_is_unplaced(pod) for pod in look.pods):
            return []
        try:
            return self.api.items("/api/v1/nodes")
        except RefusedError:
            return []

    def _bury(self, pods: list[dict[str, Any]]) -> None:
        """Remove pods whose node does not end them: they would stay for ever, and nothing would take their place.

        At once where the node is silent, else when their grace is over. What may still run there is fenced off by the
        store's lease.
        """
        now, leaving, silent = time.monotonic(), dict(terminating(pods)), set(silent_nodes(pods))
        self._leaving = {name: self._leaving.get(name, now) for name in leaving}
        for name, grace in leaving.items():
            if name in silent or now - self._leaving[name] > grace + _LATE_SECONDS:
                self.api.delete(self.api.core("pods", name), gracePeriodSeconds=0)

    def _messages_bytes(self, handle: JobHandle) -> int:
        """What grows while an attempt gets further: the size of its messages; 0 before there are any."""
        try:
            return self._folders[handle.id].messages(handle.attempt).stat().st_size
        except (KeyError, FileNotFoundError):
            return 0

    # -- ending --------------------------------------------------------------------------------------------------------
    def ask_to_stop(self, handle: JobHandle) -> None:
        """Delete the RayJob, and with it all that is its own; what its pods printed is kept in the store."""
        job = self.api.find(self.api.ray_jobs(handle.id))
        if job is None:
            return
        self._keep_logs(job, handle.attempt)
        self.api.delete(self.api.ray_jobs(handle.id))

    def stop(self, handle: JobHandle, timeout_seconds: float = 120) -> None:
        """Delete a job and wait until neither it nor a pod of its is there.

        Raises ConnectionError if it stays: KubeRay's operator, whose finalizer it has, may be away.
        """
        self.ask_to_stop(handle)
        deadline = time.monotonic() + timeout_seconds
        while True:
            job = self.api.find(self.api.ray_jobs(handle.id))
            pods = self.api.items(self.api.core("pods"), labels=f"{PREFIX}/job={handle.id}")
            if job is None and not pods:
                self._unwatch(handle)
                return
            self._bury(pods)
            if time.monotonic() > deadline:
                why = "KubeRay's operator, which takes its finalizer off, does not" if job else "its pods do not end"
                raise ConnectionError(f"RayJob {handle.id} was deleted {timeout_seconds:.0f} s ago and is there: {why}")
            time.sleep(0.5)

    def forget(self, handle: JobHandle, folder: JobFolder) -> None:
        """Delete a RayJob that has ended; its operator does the rest."""
        self._unwatch(handle)
        self.ask_to_stop(handle)

    def logs(self, handle: JobHandle, folder: JobFolder) -> str:
        """What the driver printed, or, where it was never started, what its pods did."""
        kept = [folder.log(handle.attempt), _pod_log(folder, handle.attempt)]
        return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in kept if path.is_file())

    def stacks(self, handle: JobHandle, folder: JobFolder) -> str:
        """Keep the stacks of the training's processes in each pod, where we may execute something in pods."""
        told = []
        for pod in self.api.items(self.api.core("pods"), labels=f"{PREFIX}/job={handle.id}"):
            name = pod["metadata"]["name"]
            target = folder.path / "jobs" / f"a{handle.attempt}.{name.rpartition('-')[2]}.stacks.txt"
            program = "import sys; from mlpipes.compute.stacks import *; keep_stacks(sys.argv[1], Path(sys.argv[2]))"
            command = [*shlex.split(self.python), "-c", program, folder.fingerprint, str(target)]
            try:
                told.append(f"of {name}: {self.api.execute(name, command).strip() or target}")
            except (RefusedError, ConnectionError) as error:
                told.append(f"of {name}: {error}")
        return "; ".join(told) or "are not to be had: no pod is there"

    def _keep_logs(self, job: dict[str, Any], attempt: int) -> None:
        """Keep the end of what a job's pods printed, as far as they are still there."""
        parts, folder = [], _folder(job)
        for pod in self.api.items(self.api.core("pods"), labels=f"{PREFIX}/job={job['metadata']['name']}"):
            name = pod["metadata"]["name"]
            parts.append(f"==> {name} <==\n{self.api.log(name, _LOG_LINES)}")
        if parts and folder.path.is_dir():
            _pod_log(folder, attempt).write_text(redact("\n".join(parts)), encoding="utf-8")


def _pod_log(folder: JobFolder, attempt: int) -> Path:
    return folder.log(attempt).with_suffix(".pods.log")


def _short(name: str) -> str:
    """A name as a RayJob can have it; what `name_of` makes is one."""
    return name if len(name) <= 40 and name[:1].isalpha() else training_name(name, name)


def _first_attempt(job: Mapping[str, Any]) -> int:
    number = job["metadata"]["name"].rpartition("-a")[2]
    return int(number) if number.isdigit() else 0


def _folder(job: Mapping[str, Any]) -> JobFolder:
    return JobFolder(Path(job["metadata"]["annotations"][FOLDER_ANNOTATION]))


def _is_unplaced(pod: Mapping[str, Any]) -> bool:
    conditions = pod.get("status", {}).get("conditions", [])
    return any(c["type"] == "PodScheduled" and c["status"] == "False" for c in conditions)
