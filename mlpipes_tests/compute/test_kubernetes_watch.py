"""When a job on Kubernetes is asked about: at once when something happens to its pods, and else more and more seldom."""

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from mlpipes.compute.jobs import JobState, JobStatus
from mlpipes.compute.kubernetes_api import RefusedError
from mlpipes.compute.kubernetes_watch import QUIET_SECONDS, Watched
from mlpipes_tests.waiting import until

POLL = 5.0
WAITS, RUNS = JobStatus(JobState.PENDING, "waits for quota"), JobStatus(JobState.RUNNING)


class Streams:
    """An API server whose watch says what a test has it say."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses, self.away, self.closed = refuses, False, False
        self.said, self.heard = threading.Semaphore(0), threading.Semaphore(0)

    def core(self, plural: str) -> str:
        return f"/{plural}"

    def stream(self, path: str, labels: str, seconds: int) -> Iterator[bytes]:
        assert (path, labels) == ("/pods", "mlpipes.io/job=j-a1")
        if self.refuses:
            raise RefusedError("forbidden", 403)
        try:
            yield b""
            while True:
                self.heard.release()
                self.said.acquire()
                if self.away:
                    raise ConnectionError("away")
                yield b"changed"
        finally:
            self.closed = True

    def say(self) -> None:
        """Something happens; returns once it has been heard."""
        self.said.release()
        assert self.heard.acquire(timeout=60)


class Asking:
    """Somebody who asks about a job whenever it is due, second by second."""

    def __init__(self, api: Any, status: JobStatus) -> None:
        self.api, self.now, self.grown, self.moments = api, 0.0, 0, [0.0]
        self.watched = Watched(POLL, 0.0, status, 0)
        self.until_heard()

    def until_heard(self) -> None:
        """The first question starts the watch; what it begins with is a reason to ask."""
        self.is_due()
        if not self.api.refuses:
            assert self.api.heard.acquire(timeout=60)

    def is_due(self, urgent: bool = False) -> bool:
        return self.watched.is_due(self.now, self.grown, self.api, "j-a1", urgent=urgent)

    def wait(self, seconds: int, growing: bool = False, urgent: bool = False) -> list[float]:
        """Let time pass; returns after how many seconds, from here, it was asked."""
        began, asked = self.now, []
        for _ in range(seconds):
            self.now += 1
            self.grown += growing
            if self.is_due(urgent):
                self.watched.about_to_ask()
                self.watched.learned(self.now, self.watched.status, self.grown)
                asked.append(self.now - began)
        return asked


def test_what_waits_is_asked_about_more_and_more_seldom() -> None:
    asking = Asking(Streams(), WAITS)
    asked = asking.wait(3600)
    assert asked[:3] == [1, 6, 12]  # what the watch began with, then at the settings' pace
    gaps = [after - before for before, after in itertools.pairwise(asked)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == QUIET_SECONDS
    assert len(asked) < 36


@pytest.mark.parametrize("growing", [True, False])
def test_what_runs_is_asked_about_when_something_happens_to_its_pods(growing: bool) -> None:
    asking = Asking(Streams(), RUNS)
    assert asking.wait(100, growing) == [1]
    asking.api.say()
    asking.api.say()
    assert asking.wait(100, growing) == [1]
    assert asking.wait(600, growing) == [21, 141, 261, 381, 501]
    asking.api.say()
    assert asking.wait(1) == [1]
    asking.api.say()
    assert asking.wait(0) == []
    assert not asking.is_due()  # a burst is one reason
    assert asking.wait(3) == [1]


def test_what_changes_is_asked_about_soon_again() -> None:
    asking = Asking(Streams(), WAITS)
    asking.wait(3600)
    asking.watched.learned(asking.now, JobStatus(JobState.PENDING, "0 of 3 pods are ready"), 0)
    assert asking.wait(20) == [5, 10, 20]


def test_what_is_waited_for_is_asked_about_at_the_pace_of_the_settings() -> None:
    asking = Asking(Streams(), RUNS)
    asking.wait(10)
    assert asking.wait(15, urgent=True) == [1, 6, 11]


@pytest.mark.parametrize(("growing", "expected"), [(False, [5, 10, 15, 20]), (True, [])])
def test_who_may_not_watch_asks_at_the_pace_of_the_settings(growing: bool, expected: list[float]) -> None:
    asking = Asking(Streams(refuses=True), RUNS)
    assert asking.wait(20, growing) == expected


def test_while_the_api_server_is_away_it_is_asked_at_the_pace_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlpipes.compute.kubernetes_watch._AGAIN_SECONDS", 1e6)
    asking = Asking(Streams(), RUNS)
    asking.wait(10)
    asking.api.away = True
    asking.api.said.release()
    watch: Any = asking.watched._watch
    until(lambda: not watch.is_up, "the watch notices")
    assert asking.wait(15) == [1, 6, 11]
    watch.end()


def test_the_watch_of_a_job_that_has_ended_ends() -> None:
    api = Streams()
    asking = Asking(api, RUNS)
    asking.watched.learned(1.0, JobStatus(JobState.SUCCEEDED), 0)
    api.said.release()
    until(lambda: api.closed, "its thread lets go of the stream")
