"""Ray jobs: submitted under an id that follows from the fingerprint, found again by it, followed, stopped.

Submission ids are `<fingerprint>-aN`. Whoever needs a training looks for its job first and attaches to one that is
pending or running; only otherwise the next attempt is submitted. What a job achieved is read from the
store by the caller; this module only tells when it has ended.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_exponential

from mlpipes.compute.address import RayAddress
from mlpipes.store import read_messages

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

T = TypeVar("T")

ALIVE = ("PENDING", "RUNNING")
LOST = "LOST"
"""State of a job that its cluster knows nothing of: the head was replaced."""


@dataclass(frozen=True)
class JobHandle:
    """One attempt on the cluster."""

    submission_id: str
    attempt: int
    attached: bool
    """Whether it was there already."""


class RayJobs:
    """The Jobs API of one cluster, patient with a head that is away for a while."""

    def __init__(self, address: RayAddress, patience_seconds: float | None = None) -> None:
        address.enter()
        # A private head that is away will not come back by itself: better to start it again soon.
        self.address, self.patience_seconds = address, patience_seconds or (3 if address.local else 180)

    def attach_or_submit(
        self,
        name: str,
        first_free_attempt: int,
        entrypoint: Callable[[int], str],
        environment: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> JobHandle:
        """Attach to the latest job of a name if it is alive; otherwise submit the next attempt.

        A job that has succeeded is none to attach to: whoever asks has looked for its result before and found none.

        `entrypoint(attempt)` is the command of an attempt. Attempts start at `first_free_attempt` at least, because a
        new head has forgotten the jobs of the old one. Of two callers at once, one submits and the other attaches.
        """
        known = self._attempts(name)
        latest = max(known, default=0)
        if latest and known[latest] in ALIVE:
            return JobHandle(f"{name}-a{latest}", latest, attached=True)
        attempt = max(latest + 1, first_free_attempt)
        submission_id = f"{name}-a{attempt}"
        command = entrypoint(attempt)
        try:
            self._patiently(
                lambda client: client.submit_job(
                    entrypoint=command,
                    submission_id=submission_id,
                    runtime_env={"env_vars": dict(environment)},
                    metadata=dict(metadata),
                )
            )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            return JobHandle(submission_id, attempt, attached=True)
        return JobHandle(submission_id, attempt, attached=False)

    def status(self, submission_id: str) -> str:
        """PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED, or LOST."""
        try:
            return str(self._patiently(lambda client: client.get_job_status(submission_id)).value)
        except RuntimeError as error:
            if "does not exist" in str(error):
                return LOST
            raise

    def follow(self, handle: JobHandle, messages: Path, poll_seconds: float = 0.3) -> Iterator[dict[str, Any]]:
        """All messages of an attempt from its first, until the job has ended; the last item has kind `ended`.

        Between them come items of kind `waiting`, once a poll, so that the caller can look at other signs of life.
        """
        offset, status, asked = 0, "PENDING", 0.0
        while True:
            if time.monotonic() - asked >= 1.0:
                # Asked before reading, so that nothing is missed that was written before the job ended.
                status, asked = self.status(handle.submission_id), time.monotonic()
            found, offset = read_messages(messages, offset)
            yield from found
            if status not in ALIVE:
                yield {"kind": "ended", "status": status}
                return
            yield {"kind": "waiting", "status": status}
            time.sleep(poll_seconds)

    def stop(self, submission_id: str, timeout_seconds: float = 10) -> str:
        """Ask a job to stop and wait until it has; returns its last status."""
        self._patiently(lambda client: client.stop_job(submission_id))
        deadline = time.monotonic() + timeout_seconds
        while (status := self.status(submission_id)) in ALIVE and time.monotonic() < deadline:
            time.sleep(0.2)
        return status

    def logs(self, submission_id: str) -> str:
        """What the driver printed; for people."""
        return self._patiently(lambda client: client.get_job_logs(submission_id))

    def _attempts(self, name: str) -> dict[int, str]:
        prefix = f"{name}-a"
        jobs = self._patiently(lambda client: client.list_jobs())
        return {
            int(job.submission_id.removeprefix(prefix)): str(job.status.value)
            for job in jobs
            if job.submission_id and job.submission_id.startswith(prefix)
        }

    def _patiently(self, call: Callable[["JobSubmissionClient"], T]) -> T:
        """Call the head; while it is unreachable or in trouble, try again. Raises ConnectionError when patience is out."""
        from ray.job_submission import JobSubmissionClient

        try:
            for attempt in Retrying(
                retry=retry_if_exception(_is_passing),
                stop=stop_after_delay(self.patience_seconds),
                wait=wait_exponential(multiplier=0.2, max=3),
                reraise=True,
            ):
                with attempt:
                    return call(JobSubmissionClient(self.address.dashboard, headers=self.address.headers()))
        except Exception as error:
            if _is_passing(error):
                raise ConnectionError(f"the Ray head at {self.address.dashboard} is away: {error}") from error
            raise
        raise AssertionError("unreachable")


def _is_passing(error: BaseException) -> bool:
    """Whether an error tells of a head that is away or in trouble, as against a wrong request."""
    import requests

    if isinstance(error, RuntimeError):  # how the client reports what the server answered
        return "status code 5" in str(error)
    return isinstance(error, ConnectionError | requests.RequestException)
