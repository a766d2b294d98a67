"""The driver: what it watches while the workers train."""

import os
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest

from mlpipes.store.lease import Lease
from mlpipes.store.messages import Failed, MessageWriter, Warned, read_messages
from mlpipes.training.driver import _watch_over
from mlpipes_tests.compute.test_jobs import job_in


class _EndedError(Exception):
    pass


def test_a_driver_whose_training_was_taken_over_says_so_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(code: int) -> None:
        raise _EndedError(code)

    monkeypatch.setattr(os, "_exit", end)
    job = job_in(tmp_path).model_copy(update={"attempt": 1})
    job.folder.heartbeat(1).parent.mkdir(parents=True)
    lost = Lease.take(job.folder.path, "the first")
    Lease.take(job.folder.path, "another job")
    with pytest.raises(_EndedError, match="1"):
        _watch_over(job, lost, MessageWriter(job.folder.messages(1)), threading.Event())
    (message,) = read_messages(job.folder.messages(1))[0]
    assert isinstance(message, Warned)
    assert "taken over" in message.text


@pytest.mark.parametrize("fatal", [True, False])
def test_a_driver_ends_when_a_worker_has_said_what_a_restart_would_not_mend(
    fatal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other workers may wait for that one for ever."""

    class Stop(threading.Event):
        """Time passes at once, three beats of it; then the training is over."""

        beats = 0

        def wait(self, timeout: float | None = None) -> bool:
            self.beats += 1
            return self.beats > 3

    def end(code: int) -> None:
        raise _EndedError(code)

    monkeypatch.setattr(os, "_exit", end)
    job = job_in(tmp_path).model_copy(update={"attempt": 1})
    job.folder.heartbeat(1).parent.mkdir(parents=True)
    notify = MessageWriter(job.folder.messages(1))
    notify(Failed(error="the loss became nan", fatal=fatal))
    watching = nullcontext() if not fatal else pytest.raises(_EndedError, match="1")
    with watching:
        _watch_over(job, Lease.take(job.folder.path, "this one"), notify, Stop())
