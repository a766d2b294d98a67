"""The contract of places that run trainings: who is attached to, how attempts are counted, asking for a last checkpoint."""

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mlpipes.compute import jobs
from mlpipes.compute.jobs import (
    Ended,
    JobHandle,
    Jobs,
    JobState,
    JobStatus,
    Requeued,
    ask_for_last_checkpoint,
    environment_of_jobs,
)
from mlpipes.compute.kubernetes_manifest import store_label
from mlpipes.scales import RayScaleConfig
from mlpipes.store.layout import JobFolder
from mlpipes.store.messages import CheckpointSaved, DriverStarted, Finished, MessageWriter, Started, Stopping
from mlpipes.store.outcome import Best
from mlpipes.store.recipe import Recipe
from mlpipes.store.training_job import TrainingJob
from mlpipes_tests.sandbox import CHECKOUT

STARTED = Started(step=0, total_steps=9, precision="fp32", workers=1)


class Notebook(Jobs):
    """A place that only writes down what it is asked to run."""

    name, module, python, shares_machine = "entry", "none", "python", True

    def __init__(self) -> None:
        self.entries: list[tuple[str, JobHandle]] = []
        self.environment: Mapping[str, str] = {}
        self.state = JobState.RUNNING

    def latest(self, name: str) -> tuple[JobHandle, JobStatus] | None:
        mine = [handle for known, handle in self.entries if known == name]
        return (mine[-1], JobStatus(self.state)) if mine else None

    def submit(
        self, name: str, specification: Path, attempt: int, environment: Mapping[str, str], about: str
    ) -> JobHandle:
        assert TrainingJob.read(specification).attempt == attempt
        self.environment = environment
        self.entries.append((name, JobHandle(f"{name}-a{attempt}", attempt, attached=False)))
        return self.entries[-1][1]

    def status(self, handle: JobHandle) -> JobStatus:
        return JobStatus(self.state)

    def ask_to_stop(self, handle: JobHandle) -> None:
        self.state = JobState.STOPPED

    def logs(self, handle: JobHandle, folder: JobFolder) -> str:
        return ""


def job_in(store: Path) -> TrainingJob:
    recipe = Recipe(
        workload="digits",
        implementation="mlpipes.workloads.image_classification:digits",
        snapshot="s",
        scale=RayScaleConfig(workers=1, batch_size=1, epochs=1),
        hyperparameters={},
        seed=0,
        code="test",
    )
    return TrainingJob(recipe=recipe, store=str(store), attempt=0)


@pytest.fixture
def job(tmp_path: Path) -> TrainingJob:
    made = job_in(tmp_path)
    made.folder.stop_request(1).parent.mkdir(parents=True)
    return made


def test_a_training_has_one_name_and_another_store_another(tmp_path: Path) -> None:
    here, there = job_in(tmp_path / "a"), job_in(tmp_path / "b")
    assert here.recipe.fingerprint == there.recipe.fingerprint
    assert Jobs.name_of(here) == Jobs.name_of(job_in(tmp_path / "a"))
    assert Jobs.name_of(here) != Jobs.name_of(there)
    assert Jobs.name_of(here).startswith(here.recipe.fingerprint), "people find it by the fingerprint"


@pytest.mark.parametrize(
    ("set_here", "expected"),
    [(None, []), ("", []), (f"/packages{os.pathsep}{os.pathsep}mine", ["/packages", "{}/mine"])],
)
def test_what_is_on_the_python_path_here_is_there_for_a_job_on_this_machine(
    job: TrainingJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_here: str | None, expected: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if set_here is not None:
        monkeypatch.setenv("PYTHONPATH", set_here)
    place = Notebook()
    place.attach_or_submit(job)
    checkout, *others = place.environment["PYTHONPATH"].split(os.pathsep)
    assert checkout == str(CHECKOUT)
    assert others == [folder.format(tmp_path) for folder in expected]


def test_workers_are_asked_twice_a_second_or_as_often_as_one_says(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
    monkeypatch.setenv(name, "")
    assert environment_of_jobs(Path("/home"), shares_machine=True)[name] == "0.5"
    monkeypatch.setenv(name, "3")
    assert environment_of_jobs(Path("/home"), shares_machine=True)[name] == "3"


def test_a_job_elsewhere_has_its_own_python_path(job: TrainingJob) -> None:
    place = Notebook()
    place.shares_machine = False
    place.attach_or_submit(job)
    assert "PYTHONPATH" not in place.environment


def test_a_job_that_lives_is_attached_to_and_one_that_ended_is_followed_by_the_next_attempt(job: TrainingJob) -> None:
    place = Notebook()
    first = place.attach_or_submit(job)
    assert place.attach_or_submit(job).id == first.id
    assert len(place.entries) == 1
    place.state = JobState.FAILED
    assert [place.attach_or_submit(job).attempt for _ in range(2)] == [2, 3]


def test_attempts_count_on_where_the_place_has_forgotten_them(job: TrainingJob) -> None:
    place = Notebook()
    place.attach_or_submit(job)
    assert Notebook().attach_or_submit(job).attempt == 2, "the first left its specification"
    MessageWriter(job.folder.messages(4))(STARTED)
    assert Notebook().attach_or_submit(job).attempt == 5


def test_a_requeued_job_is_followed_into_its_next_attempt_from_its_first_message(job: TrainingJob) -> None:
    class Queue(Notebook):
        poll_seconds = 0.0

        def status(self, handle: JobHandle) -> JobStatus:
            return (
                JobStatus(JobState.REQUEUED, "PREEMPTED", 2) if handle.attempt == 1 else JobStatus(JobState.SUCCEEDED)
            )

    place = Queue()
    handle = place.attach_or_submit(job)
    for attempt, steps in ((1, 9), (2, 2)):  # the second has written less than the first
        for step in range(steps):
            MessageWriter(job.folder.messages(attempt))(CheckpointSaved(step=step, path=f"of a{attempt}"))
    seen = list(place.follow(handle, job.folder))
    assert [event.path for event in seen if isinstance(event, CheckpointSaved)] == ["of a1"] * 9 + ["of a2"] * 2
    assert seen[9] == Requeued(2, "PREEMPTED")
    assert seen[12:] == [Ended(JobStatus(JobState.SUCCEEDED))]


def test_two_callers_at_once_submit_one_job(job: TrainingJob) -> None:
    place = Notebook()
    callers = [threading.Thread(target=place.attach_or_submit, args=[job]) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(place.entries) == 1


def test_stopping_waits_until_the_job_has_ended(job: TrainingJob) -> None:
    class Slow(Notebook):
        asked = 0

        def ask_to_stop(self, handle: JobHandle) -> None:
            """It takes its time: it ends when it has been looked at three times."""

        def status(self, handle: JobHandle) -> JobStatus:
            self.asked += 1
            return JobStatus(JobState.RUNNING if self.asked < 3 else JobState.STOPPED)

    place = Slow()
    place.stop(place.attach_or_submit(job), timeout_seconds=300)
    assert place.asked == 3


class Clock:
    """Time that goes on only while somebody sleeps; `then` is done at the third look."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.now, self.sleeps, self.then = 0.0, 0, then

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps += 1
        if self.sleeps == 3:
            self.then()


@pytest.mark.parametrize(
    "last", [Stopping(step=1), Finished(step=1, total_steps=1, best=Best(step=1, epoch=1, metrics={}))]
)
def test_a_last_checkpoint_is_waited_for(
    job: TrainingJob, monkeypatch: pytest.MonkeyPatch, last: Stopping | Finished
) -> None:
    messages = MessageWriter(job.folder.messages(1))
    messages(STARTED)
    clock = Clock(lambda: messages(last))
    monkeypatch.setattr(jobs, "time", clock)
    ask_for_last_checkpoint(job.folder, 1, seconds=30)
    assert job.folder.stop_request(1).exists()
    assert clock.sleeps == 3, "until the message came, and no longer"


def test_a_last_checkpoint_is_not_waited_for_for_ever(job: TrainingJob, monkeypatch: pytest.MonkeyPatch) -> None:
    MessageWriter(job.folder.messages(1))(STARTED)
    clock = Clock(lambda: None)
    monkeypatch.setattr(jobs, "time", clock)
    ask_for_last_checkpoint(job.folder, 1, seconds=30)
    assert clock.now == pytest.approx(30, abs=1)


def test_who_has_not_begun_to_train_has_nothing_to_save(job: TrainingJob, monkeypatch: pytest.MonkeyPatch) -> None:
    MessageWriter(job.folder.messages(1))(DriverStarted(attempt=1, workload="digits", scale="w1-b1-e1-g0"))
    clock = Clock(lambda: None)
    monkeypatch.setattr(jobs, "time", clock)
    ask_for_last_checkpoint(job.folder, 1, seconds=30)
    assert job.folder.stop_request(1).exists()
    assert clock.sleeps == 0


def test_another_store_at_the_same_path_has_other_names(tmp_path: Path) -> None:
    here = job_in(tmp_path)
    name, label = Jobs.name_of(here), store_label(here.store)
    (tmp_path / "store.json").unlink()  # as another volume in its place has another one, or none yet
    assert Jobs.name_of(here) != name
    assert store_label(here.store) != label
