"""Ray jobs: submitted over the Jobs API under an id that follows from the fingerprint, and found again by it.

Submission ids are `<fingerprint>-<store>-aN`.
"""

import shlex
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_exponential

from mlpipes.compute import warm_driver
from mlpipes.compute.address import RayAddress, as_given
from mlpipes.compute.jobs import JobHandle, Jobs, JobState, JobStatus
from mlpipes.compute.preflight import check_cluster, nodes_of
from mlpipes.scales import RayScaleConfig
from mlpipes.store.environment import apply
from mlpipes.store.layout import JobFolder
from mlpipes.store.training_job import TrainingJob

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

T = TypeVar("T")


class RayJobs(Jobs):
    """The Jobs API of one cluster, patient with a head that is away for a while."""

    name = "Ray job"
    module = "mlpipes.training.driver"
    submitted: ClassVar[set[str]] = set()
    """The jobs that this process has submitted."""

    def __init__(self, address: RayAddress, patience_seconds: float | None = None) -> None:
        apply()  # Ray's clients heed RAY_API_SERVER_ADDRESS and RAY_ADDRESS more than the address that they are given
        # A private head that is away will not come back by itself: better to start it again soon.
        self.address, self.patience_seconds = address, patience_seconds or (3 if address.local else 180)
        self._client: JobSubmissionClient | None = None
        self.shares_machine, self.python = address.local, shlex.quote(sys.executable) if address.local else "python"

    def check(self, scale: RayScaleConfig, data_bytes: int, min_workers: int | None = None) -> None:
        """Raises PreflightError if the cluster's nodes cannot hold a scale's workers."""
        check_cluster(scale, nodes_of(self.address), data_bytes, min_workers)

    def latest(self, name: str) -> tuple[JobHandle, JobStatus] | None:
        """The latest attempt that the head knows; a new head has forgotten the jobs of the old one."""
        known = self._attempts(name)
        if not known:
            return None
        attempt = max(known)
        return JobHandle(f"{name}-a{attempt}", attempt, attached=True), JobStatus(known[attempt])

    def submit(
        self, name: str, specification: Path, attempt: int, environment: Mapping[str, str], about: str
    ) -> JobHandle:
        """Submit an attempt, or attach to it if somebody else has."""
        submission_id, reserved = f"{name}-a{attempt}", self._reserved(specification)
        start: str = f"{self.python} -m"
        runtime: dict[str, Any] = {"env_vars": dict(environment)}
        if self.address.local:
            start = f"env OMP_NUM_THREADS={self._threads(specification)} {self.python} -m {warm_driver.__name__}"
            runtime["py_executable"] = start  # by which Ray starts a job's workers
        # exec: without it a shell stands between Ray and the driver, and the driver survives the head's death.
        command = f"exec {start} {self.module} {shlex.quote(str(specification))}"
        try:
            self._patiently(
                lambda client: client.submit_job(
                    entrypoint=command,
                    submission_id=submission_id,
                    runtime_env=runtime,
                    metadata={"about": about},
                    **reserved,
                )
            )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            return JobHandle(submission_id, attempt, attached=True)
        self.submitted.add(submission_id)
        return JobHandle(submission_id, attempt, attached=False)

    def _threads(self, specification: Path) -> int:
        """Compute threads of each process, as Ray would set them; NumPy and torch look at them when they are imported."""
        return TrainingJob.read(specification).recipe.scale.threads

    def _reserved(self, specification: Path) -> dict[str, Any]:
        """What a driver itself needs of the cluster: a worker's part, where it is the worker."""
        scale = TrainingJob.read(specification).recipe.scale
        if not scale.trains_in_driver:
            return {}
        return {"entrypoint_num_cpus": scale.cpus_per_worker, "entrypoint_num_gpus": scale.gpus_per_worker or None}

    def status(self, handle: JobHandle) -> JobStatus:
        """How a job stands; LOST if the head does not know it."""
        try:
            return JobStatus(JobState(self._patiently(lambda client: client.get_job_status(handle.id)).value))
        except RuntimeError as error:
            if "does not exist" in str(error):
                return JobStatus(JobState.LOST)
            raise

    def ask_to_stop(self, handle: JobHandle) -> None:
        """Have the head end a job."""
        self._patiently(lambda client: client.stop_job(handle.id))

    def logs(self, handle: JobHandle, folder: JobFolder) -> str:
        """What the driver printed; for people."""
        return self._patiently(lambda client: client.get_job_logs(handle.id))

    def _attempts(self, name: str) -> dict[int, JobState]:
        prefix = f"{name}-a"
        jobs = self._patiently(lambda client: client.list_jobs())
        return {
            int(job.submission_id.removeprefix(prefix)): JobState(job.status.value)
            for job in jobs
            if job.submission_id and job.submission_id.startswith(prefix)
        }

    def _patiently(self, call: Callable[["JobSubmissionClient"], T]) -> T:
        """Call the head; while it is unreachable or in trouble, try again. Raises ConnectionError when patience is out."""
        if not self.address.lives():
            raise ConnectionError(f"the Ray at {self.address.dashboard} has died")
        try:
            return Retrying(
                retry=retry_if_exception(lambda error: _is_passing(error) and self.address.lives()),
                stop=stop_after_delay(self.patience_seconds),
                wait=wait_exponential(multiplier=0.2, max=3),
                reraise=True,
            )(lambda: self._call(call))
        except Exception as error:
            if _is_passing(error):
                raise ConnectionError(f"the Ray head at {self.address.dashboard} is away: {error}") from error
            raise

    def _call(self, call: Callable[["JobSubmissionClient"], T]) -> T:
        """Call with the client that there is: a new one asks the head for its version first."""
        if self._client is None:
            self._client = _client_type()(self.address.dashboard, headers=self.address.headers())
        try:
            return call(self._client)
        except Exception:
            self._client = None  # another head may answer next
            raise


@cache
def _client_type() -> "type[JobSubmissionClient]":
    """Ray's client, whose requests carry the headers that it was given, whatever ~/.netrc has for the host."""
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, **options, auth=as_given)

    return Client


def _is_passing(error: BaseException) -> bool:
    """Whether an error tells of a head that is away or in trouble, as against a wrong request."""
    import requests

    if isinstance(error, RuntimeError):  # how the client reports what the server answered
        return "status code 5" in str(error)
    return isinstance(error, ConnectionError | requests.RequestException)
