"""What pods run: an entry point that claims its attempt, and a farewell that waits for a last checkpoint, not for nobody."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlpipes.compute import kubernetes_entry as entry
from mlpipes.store.claims import claim
from mlpipes.store.messages import Failed, MessageWriter, Started, Stopping, Warned, read_messages
from mlpipes.store.training_job import TrainingJob
from mlpipes_tests.compute.test_jobs import job_in
from mlpipes_tests.waiting import until

STARTED = Started(step=0, total_steps=9, precision="fp32", workers=1)


@pytest.fixture
def job(tmp_path: Path) -> TrainingJob:
    made = job_in(tmp_path).model_copy(update={"attempt": 1})
    made.write()
    return made


def driven(job: TrainingJob, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Run the entry point up to the point where it becomes the driver; returns the driver's arguments."""
    became: list[Any] = []
    monkeypatch.setattr(entry.os, "dup2", lambda *_: None)
    monkeypatch.setattr(entry.os, "execve", lambda *arguments: became.extend(arguments) or 0)
    assert entry.main([str(job.folder.specification(1)), "digits-x-a1"]) == 0
    return became


def test_the_second_run_is_the_next_attempt_with_a_specification_of_its_own(
    job: TrainingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    _, command, environment = driven(job, monkeypatch)
    assert command[-2:] == ["mlpipes.training.driver", str(job.folder.specification(1))]
    assert environment["RAY_ADDRESS"] == "10.0.0.1:6379", "the driver is to find this Ray"
    command = driven(job, monkeypatch)[1]
    assert command[-1] == str(job.folder.specification(2))
    assert TrainingJob.read(job.folder.specification(2)) == job.model_copy(update={"attempt": 2})
    (said,) = [message for message in read_messages(job.folder.messages(2))[0] if isinstance(message, Warned)]
    assert "attempt 2 goes on after attempt 1" in said.text


def test_a_run_that_comes_too_late_ends(
    job: TrainingJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job.model_copy(update={"attempt": 2}).write()
    monkeypatch.setattr(entry.os, "execve", lambda *_: pytest.fail("it became a driver"))
    assert entry.main([str(job.folder.specification(1)), "digits-x-a1"]) == entry.SUPERSEDED
    assert "another job continues this training" in capsys.readouterr().err


def test_a_volume_that_is_another_one_or_cannot_be_written_is_told(
    job: TrainingJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    specification = job.folder.specification(1)
    monkeypatch.setattr(entry, "_VISIBLE_SECONDS", 0.0)
    assert entry.main([f"{specification}.elsewhere", "digits-x-a1"]) == entry.UNUSABLE
    said = capsys.readouterr().err
    assert said.startswith(
        f"{entry.UNUSABLE_VOLUME}{specification}.elsewhere is not there in the pod: `store.claim` is"
    )
    monkeypatch.setattr(entry, "claim", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only", "/x")))
    assert entry.main([str(specification), "digits-x-a1"]) == entry.UNUSABLE
    assert f"{entry.UNUSABLE_VOLUME}/x: Read-only, in a pod of user {os.getuid()}" in capsys.readouterr().err
    monkeypatch.setattr(entry, "claim", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full", "/x")))
    with pytest.raises(OSError, match="full"):  # which passes, and another attempt is made
        entry.main([str(specification), "digits-x-a1"])


def farewell(job: TrainingJob) -> None:
    assert entry.main(["--farewell", "300", str(job.folder.specification(1)), "digits-x-a1"]) == 0


class Beating:
    """A driver that lives, and answers when it is asked."""

    def __init__(self, job: TrainingJob, attempt: int, answer: Callable[[], None]) -> None:
        self.job, self.attempt, self.answer, self.over = job, attempt, answer, threading.Event()
        self.thread = threading.Thread(target=self._beat)

    def __enter__(self) -> "Beating":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _beat(self) -> None:
        while not self.over.wait(0.05):
            self.job.folder.heartbeat(self.attempt).touch()
            if self.job.folder.stop_request(self.attempt).exists():
                self.answer()


def test_a_pod_waits_for_a_checkpoint_of_the_current_attempt_and_takes_its_request_back(job: TrainingJob) -> None:
    for _ in range(2):
        claim(job.folder, "digits-x-a1", 1)
    messages = MessageWriter(job.folder.messages(2))
    messages(STARTED)
    messages(Stopping(step=1))  # asked once before, on pods that have gone since
    with Beating(job, 2, lambda: messages(Stopping(step=5))):
        farewell(job)
    assert [m.step for m in read_messages(messages.path)[0] if isinstance(m, Stopping)][:2] == [1, 5]
    assert not job.folder.stop_request(2).exists()
    assert not job.folder.stop_request(1).exists()


@pytest.mark.parametrize("said", [[], [STARTED, Failed(error="x", fatal=False)]])
def test_where_nothing_trains_a_pod_goes_at_once(job: TrainingJob, said: list[Any]) -> None:
    claim(job.folder, "digits-x-a1", 1)
    for message in said:
        MessageWriter(job.folder.messages(1))(message)
    farewell(job)
    assert not job.folder.stop_request(1).exists()


def test_where_the_result_is_there_or_nothing_was_claimed_a_pod_goes_at_once(job: TrainingJob) -> None:
    MessageWriter(job.folder.messages(1))(STARTED)
    farewell(job)
    claim(job.folder, "digits-x-a1", 1)
    job.folder.result.write_text("{}")
    farewell(job)


def test_nobody_waits_for_a_driver_that_is_dead(job: TrainingJob, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(job.folder, "digits-x-a1", 1)
    MessageWriter(job.folder.messages(1))(STARTED)
    job.folder.heartbeat(1).touch()
    ticks = iter(range(10**6))
    monkeypatch.setattr(entry.time, "monotonic", lambda: float(next(ticks)))
    monkeypatch.setattr(entry.time, "sleep", lambda _: None)
    farewell(job)
    assert next(ticks) < 60, "it was not waited for to the end"


def test_farewells_of_two_pods_at_once_are_both_answered(job: TrainingJob) -> None:
    claim(job.folder, "digits-x-a1", 1)
    messages = MessageWriter(job.folder.messages(1))
    messages(STARTED)
    with Beating(job, 1, lambda: messages(Stopping(step=5))):
        pods = [threading.Thread(target=farewell, args=[job]) for _ in range(3)]
        for pod in pods:
            pod.start()
        for pod in pods:
            until(lambda pod=pod: not pod.is_alive(), "the pod's farewell is over")
    assert os.path.exists(job.folder.messages(1))  # noqa: PTH110
