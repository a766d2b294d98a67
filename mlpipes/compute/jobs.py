"""Jobs: how a training is submitted, found again, followed and stopped, wherever it runs.

Whoever needs a training looks for its job first and attaches to one that waits or runs; only otherwise the next attempt is
submitted. What a job achieved is read from the store by the caller; this module only tells when it has ended.
"""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from filelock import FileLock

from mlpipes.compute import stacks
from mlpipes.compute.stacks import FINGERPRINT_VARIABLE
from mlpipes.scales import RayScaleConfig
from mlpipes.store.claims import submission_lock
from mlpipes.store.environment import value_of
from mlpipes.store.identity import mark_of
from mlpipes.store.layout import JobFolder, TrainingFolder
from mlpipes.store.messages import Finished, Message, Started, Stopping, read_messages
from mlpipes.store.training_job import TrainingJob, forget_handovers


class JobState(StrEnum):
    """How a job stands, or how whoever follows it found that it has ended."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"
    LOST = "LOST"
    """Nobody knows of it: the head was replaced, or it ended long ago."""
    REQUEUED = "REQUEUED"
    """It was put back into its queue: `attempt` is the one that it waits for or runs now."""
    REFUSED = "REFUSED"
    """It waits and can never start."""
    DEAD = "DEAD"
    """Its driver gives no sign of life, whatever the place says of it."""
    STALLED = "STALLED"
    """Its driver lives, and the training reports nothing."""


_POLL_VARIABLE = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
ALIVE = (JobState.PENDING, JobState.RUNNING)


@dataclass(frozen=True)
class JobHandle:
    """One attempt on the cluster."""

    id: str
    """By which the cluster knows the job."""
    attempt: int
    attached: bool
    """Whether it was there already."""


@dataclass(frozen=True)
class JobStatus:
    """How a job stands."""

    state: JobState
    reason: str = ""
    """Why it is so, in the cluster's words."""
    attempt: int = 0
    """Of a job that was put back into its queue, the attempt that it waits for or runs now."""


@dataclass(frozen=True)
class Waiting:
    """Nothing more was said so far, and the job is alive."""

    status: JobStatus


@dataclass(frozen=True)
class Requeued:
    """The job was put back into its queue, for another attempt."""

    attempt: int
    reason: str


@dataclass(frozen=True)
class Ended:
    """The job has ended."""

    status: JobStatus


Event = Message | Waiting | Requeued | Ended


def ask_for_last_checkpoint(folder: TrainingFolder, attempt: int, seconds: float) -> None:
    """Ask an attempt that is about to be ended for a last checkpoint; returns when it is there, or the time is over.

    Returns at once where there is nothing to save yet, because the workers have not started to train.
    """
    request, path = folder.stop_request(attempt), folder.messages(attempt)
    found, offset = read_messages(path)
    started, was_asked = any(isinstance(message, Started) for message in found), request.exists()
    # What was answered on pods or nodes that have gone since, the attempt is to be asked again.
    latest = [message for message in found if isinstance(message, Started | Stopping | Finished)][-1:]
    answered = any(isinstance(m, Finished) or (was_asked and isinstance(m, Stopping)) for m in latest)
    request.touch()
    deadline = time.monotonic() + seconds
    while started and not answered and time.monotonic() < deadline:
        found, offset = read_messages(path, offset)
        if any(isinstance(message, Stopping | Finished) for message in found):
            return
        time.sleep(0.1)


def environment_of_jobs(home: Path, shares_machine: bool) -> dict[str, str]:
    """The variables that each job of a home folder gets, less what tells it from others."""
    environment = {
        "MLPIPES_HOME": str(home),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONUNBUFFERED": "1",
        # Ray Train's own is 2 s, for one of which, in the mean, a training of several workers waited at its end.
        _POLL_VARIABLE: value_of(_POLL_VARIABLE) or "0.5",
    }
    return environment | ({"PYTHONPATH": python_path()} if shares_machine else {})


def python_path() -> str:
    """`PYTHONPATH` for a job that shares this machine's files: this checkout, then what it is here.

    A workload's package may be on nothing else; where a job begins is not here, so that relative folders are made absolute.
    """
    here = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    checkout = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(dict.fromkeys([checkout, *(str(Path(folder).absolute()) for folder in here)]))


class Jobs(ABC):
    """A place where trainings run as jobs. All methods raise ConnectionError if it does not answer for long."""

    name: ClassVar[str]
    """What a job is called there."""
    module: ClassVar[str]
    """What the job runs, with the specification's path as its argument."""
    python: str
    """The command that starts Python there."""
    shares_machine: bool
    """Whether the job finds this checkout where it is here."""
    doctor: ClassVar[str] = ""
    """The command that says what is wrong with the place; empty where there is none."""
    poll_seconds: float = 1.0
    """How often the place is asked how a job stands."""

    def check(self, scale: RayScaleConfig, data_bytes: int, min_workers: int | None = None) -> None:  # noqa: B027
        """Raises PreflightError if it is known beforehand that the place cannot hold a training of a scale."""

    @abstractmethod
    def latest(self, name: str) -> tuple[JobHandle, JobStatus] | None:
        """The latest attempt under a name that is known there, and how it stands; None if there is none."""

    @abstractmethod
    def submit(
        self, name: str, specification: Path, attempt: int, environment: Mapping[str, str], about: str
    ) -> JobHandle:
        """Submit an attempt; `about` is for people. Raises PreflightError if it is refused."""

    @staticmethod
    def name_of(job: TrainingJob) -> str:
        """The name under which a training's jobs are found: its fingerprint, and which store it is for.

        Two stores may ask one cluster for the same training, and neither may take the other's job for its own, also where
        both are mounted at the same path.
        """
        return f"{job.recipe.fingerprint}-{mark_of(job.store)}"

    def attach_or_submit(self, job: TrainingJob, name: str | None = None) -> JobHandle:
        """The job of a training: the one that is alive, or the next attempt, submitted.

        A job that has succeeded is none to attach to: whoever asks has looked for its result before and found none.
        """
        recipe, folder = job.recipe, job.folder
        name, jobs = name or self.name_of(job), folder.specification(0).parent
        jobs.mkdir(parents=True, exist_ok=True)
        with FileLock(str(submission_lock(folder))):  # of two callers at once, one submits and the other attaches
            latest = self.latest(name)
            if latest is not None and latest[1].state in ALIVE:
                return latest[0]
            # The place may have forgotten earlier attempts. A job that was put back into its queue counts on by itself,
            # so specifications count as well as messages.
            earlier = [*folder.messages(0).parent.glob("a*.jsonl"), *jobs.glob("a*.json")]
            attempt = 1 + max([latest[0].attempt if latest else 0, *(int(path.stem[1:]) for path in earlier)])
            environment = environment_of_jobs(Path(job.store).parent, self.shares_machine)
            environment[FINGERPRINT_VARIABLE] = recipe.fingerprint if name == self.name_of(job) else name
            forget_handovers(folder)
            specification = job.model_copy(update={"attempt": attempt}).write()
            about = f"{recipe.workload} {recipe.scale.key} Dagster run {job.requested_by}"
            return self.submit(name, specification, attempt, environment, about)

    @abstractmethod
    def status(self, handle: JobHandle) -> JobStatus:
        """How a job stands."""

    @abstractmethod
    def ask_to_stop(self, handle: JobHandle) -> None:
        """Have a job ended; it may take its time."""

    def stop(self, handle: JobHandle, timeout_seconds: float = 10) -> None:
        """End a job and wait until it has ended."""
        self.ask_to_stop(handle)
        deadline = time.monotonic() + timeout_seconds
        while self.status(handle).state in ALIVE and time.monotonic() < deadline:
            time.sleep(0.2)

    @abstractmethod
    def logs(self, handle: JobHandle, folder: JobFolder) -> str:
        """What the job of a training printed; for people."""

    def stacks(self, handle: JobHandle, folder: JobFolder) -> str:
        """Keep the stacks of a training's processes, for whoever wants to know why it hung; says whose, and where."""
        target = folder.path / "jobs" / f"a{handle.attempt}.stacks.txt"
        return f"of the processes on this machine: {stacks.keep_stacks(folder.fingerprint, target)}"

    def forget(self, handle: JobHandle, folder: JobFolder) -> None:  # noqa: B027
        """Have nothing left of a job that has ended, where the place would keep it; what it printed stays in the store."""

    def follow(self, handle: JobHandle, folder: JobFolder, poll_seconds: float = 0.3) -> Iterator[Event]:
        """All messages of an attempt from its first, until the job has `Ended`.

        Between them comes `Waiting`, once a poll, so that the caller can look at other signs of life. A job that is put
        back into its queue is followed into its next attempt, which `Requeued` names.
        """
        offset, status, asked = 0, JobStatus(JobState.PENDING), float("-inf")
        while True:
            if time.monotonic() - asked >= self.poll_seconds:
                # Asked before reading, so that nothing is missed that was written before the job ended.
                status, asked = self.status(handle), time.monotonic()
            found, offset = read_messages(folder.messages(handle.attempt), offset)
            yield from found
            if status.state == JobState.REQUEUED:
                handle, offset, asked = replace(handle, attempt=status.attempt), 0, float("-inf")
                yield Requeued(status.attempt, status.reason)
                continue
            if status.state not in ALIVE:
                yield Ended(status)
                return
            yield Waiting(status)
            time.sleep(poll_seconds)
