"""Following a training: what becomes of jobs that are dead, stalled, lost or requeued, and when restarts are given up."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import dagster as dg
import pytest

from mlpipes.compute import stacks
from mlpipes.compute.jobs import JobHandle, Jobs, JobState, JobStatus
from mlpipes.errors import TrainingFailedError
from mlpipes.orchestration import following
from mlpipes.orchestration.following import MAX_JOBS, _Restarts, follow_training
from mlpipes.store.files import write_record
from mlpipes.store.layout import JobFolder, TrainingFolder
from mlpipes.store.messages import Waits, read_messages
from mlpipes.store.training_job import TrainingJob
from mlpipes_tests.compute.test_jobs import job_in

RUNNING, SUCCEEDED = JobStatus(JobState.RUNNING), JobStatus(JobState.SUCCEEDED)
Answers = Iterator[JobStatus]


class Place(Jobs):
    """A place whose jobs do what a test has written down: for each that is submitted, how it stands when it is asked."""

    name, module, python, shares_machine, poll_seconds = "job", "none", "python", True, 0.0

    def __init__(self, *jobs: Callable[[], Answers]) -> None:
        self.scripts = list(jobs)
        self.submitted: list[JobHandle] = []
        self.stopped: list[JobHandle] = []
        self.forgotten: list[JobHandle] = []
        self.answers: Answers = iter(())

    def latest(self, name: str) -> tuple[JobHandle, JobStatus] | None:
        return None

    def submit(
        self, name: str, specification: Path, attempt: int, environment: Mapping[str, str], about: str
    ) -> JobHandle:
        self.answers = self.scripts.pop(0)()
        self.submitted.append(JobHandle(f"job-{len(self.submitted) + 1}", attempt, attached=False))
        return self.submitted[-1]

    def status(self, handle: JobHandle) -> JobStatus:
        return next(self.answers)

    def ask_to_stop(self, handle: JobHandle) -> None:
        self.stopped.append(handle)
        self.answers = iter([JobStatus(JobState.STOPPED)] * 9)

    def forget(self, handle: JobHandle, folder: JobFolder) -> None:
        self.forgotten.append(handle)

    def logs(self, handle: JobHandle, folder: JobFolder) -> str:
        return "what it printed"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingJob:
    made = job_in(tmp_path)
    made.folder.heartbeat(1).parent.mkdir(parents=True)
    monkeypatch.setattr(Jobs.follow, "__defaults__", (0.0,))  # asked without a pause
    return made


def follow(place: Place, job: TrainingJob, stall_seconds: float = 1e9) -> None:
    context: Any = SimpleNamespace(
        log=MagicMock(),
        log_event=MagicMock(),
        asset_key=dg.AssetKey("checkpoints"),
        partition_key="w1-b1-e1-g0",
        instance=MagicMock(get_run_by_id=lambda _: None),
        run=SimpleNamespace(run_id="r"),
    )
    follow_training(context, lambda: place, job, stall_seconds, {"mlflow": "none"})


def finishing(job: TrainingJob) -> Callable[[], Answers]:
    """A job that brings the result."""

    def script() -> Answers:
        yield RUNNING
        write_record(job.folder.result, {})
        while True:
            yield SUCCEEDED

    return script


def standing_still(job: TrainingJob, attempt: int = 1) -> Callable[[], Answers]:
    """A job that runs, as the place says, and whose driver gave one sign of life."""

    def script() -> Answers:
        job.folder.heartbeat(attempt).touch()
        while True:
            yield RUNNING

    return script


def requeued(job: TrainingJob) -> Callable[[], Answers]:
    """A job that is put back into its queue once, and stands still in its second attempt."""

    def script() -> Answers:
        yield RUNNING
        yield JobStatus(JobState.REQUEUED, "PREEMPTED", 2)
        yield from standing_still(job, 2)()

    return script


@pytest.fixture
def kept_stacks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    kept: list[str] = []
    monkeypatch.setattr(stacks, "keep_stacks", lambda _, path: kept.append(path.name))
    return kept


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a second at each look, so that it does not matter how fast this machine is."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(following.time, "monotonic", lambda: float(next(ticks)))


def test_a_job_without_a_heartbeat_is_stopped_and_followed_by_the_next(
    job: TrainingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "DEAD_SECONDS", 0.0)
    place = Place(standing_still(job), finishing(job))
    follow(place, job)
    assert [handle.attempt for handle in place.submitted] == [1, 2]
    assert place.stopped == place.submitted[:1]


@pytest.mark.usefixtures("clock")
def test_a_job_that_says_nothing_is_stopped_and_its_stacks_are_kept(
    job: TrainingJob, kept_stacks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "DEAD_SECONDS", 1e9)
    place = Place(standing_still(job), finishing(job))
    follow(place, job, stall_seconds=100.0)
    assert kept_stacks == ["a1.stacks.txt"]
    assert place.stopped == place.submitted[:1]
    assert [handle.attempt for handle in place.submitted] == [1, 2]


def test_a_job_that_nobody_knows_any_more_is_submitted_again(job: TrainingJob) -> None:
    place = Place(lambda: iter([RUNNING, JobStatus(JobState.LOST)]), finishing(job))
    follow(place, job)
    assert [handle.attempt for handle in place.submitted] == [1, 2]
    assert place.stopped == []


@pytest.mark.usefixtures("clock")
def test_after_a_requeue_it_is_the_new_attempt_that_is_stopped_and_whose_stacks_are_kept(
    job: TrainingJob, kept_stacks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "DEAD_SECONDS", 1e9)
    place = Place(requeued(job), finishing(job))
    job.folder.messages(2).parent.mkdir(exist_ok=True)
    follow(place, job, stall_seconds=100.0)
    assert (place.stopped[0].id, place.stopped[0].attempt) == ("job-1", 2)
    assert kept_stacks == ["a2.stacks.txt"]
    assert len(place.submitted) == 2


def test_who_gets_no_further_is_given_up_with_what_was_printed(job: TrainingJob) -> None:
    place = Place(*[lambda: iter([RUNNING, JobStatus(JobState.FAILED, "crashed")])] * MAX_JOBS)
    with pytest.raises(TrainingFailedError, match=r"5 jobs in a row .*\(crashed\):\nwhat it printed"):
        follow(place, job)


def test_restarts_are_given_up_when_five_in_a_row_bring_no_checkpoint(tmp_path: Path) -> None:
    folder = TrainingFolder(tmp_path)
    restarts = _Restarts(folder)
    assert [restarts.are_in_vain() for _ in range(4)] == [False] * 4
    for step in range(1, 20):  # as a job that is requeued at each time limit, and gets on each time
        (folder.checkpoints / f"step-{step:08d}").mkdir(parents=True)
        assert not restarts.are_in_vain()
    assert [restarts.are_in_vain() for _ in range(MAX_JOBS - 1)] == [False] * (MAX_JOBS - 2) + [True]
    assert str(restarts) == "5 jobs in a row ended without a result and got no further than step 19"


def test_why_a_job_waits_is_noted_where_it_is_asked_for_and_nothing_is_left_of_it(job: TrainingJob) -> None:
    def waiting_then_running() -> Answers:
        for reason in ("3 ahead", "3 ahead", "2 ahead"):
            yield JobStatus(JobState.PENDING, reason)
        yield from finishing(job)()

    place = Place(waiting_then_running)
    follow(place, job)
    told = [message.reason for message in read_messages(job.folder.messages(1))[0] if isinstance(message, Waits)]
    assert told == ["3 ahead", "2 ahead", ""], "and that it waits no more"
    assert place.forgotten == place.submitted


def test_nothing_is_left_of_a_job_that_failed(job: TrainingJob) -> None:
    place = Place(lambda: iter([JobStatus(JobState.FAILED, "exit 1")]), finishing(job))
    follow(place, job)
    assert place.forgotten == place.submitted


def test_a_cancelled_run_submits_nothing_more_if_its_job_does_not_end(
    job: TrainingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stuck(Place):
        def stop(self, handle: JobHandle, timeout_seconds: float = 10) -> None:
            raise ConnectionError("the operator, which takes its finalizer off, does not")

    def interrupted() -> Answers:
        yield RUNNING
        raise KeyboardInterrupt

    monkeypatch.setattr(following, "is_cancelled", lambda _: True)
    place = Stuck(interrupted, finishing(job))
    with pytest.raises(KeyboardInterrupt):
        follow(place, job)
    assert len(place.submitted) == 1


def test_a_job_that_is_put_back_again_and_again_and_gets_no_further_is_given_up(job: TrainingJob) -> None:
    """As when the time limit of a batch job is shorter than the start of a training."""

    def script() -> Answers:
        for attempt in range(1, 100):
            job.folder.messages(attempt).parent.mkdir(exist_ok=True)
            yield RUNNING
            yield JobStatus(JobState.REQUEUED, "TIMEOUT", attempt + 1)

    place = Place(script)
    with pytest.raises(TrainingFailedError, match=r"5 jobs in a row .*is the time limit of a job too short\?"):
        follow(place, job)
    assert [handle.attempt for handle in place.stopped] == [MAX_JOBS + 1]
    assert len(place.submitted) == 1
