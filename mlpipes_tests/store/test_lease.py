import multiprocessing as mp
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlpipes.errors import LeaseLostError
from mlpipes.store import lease as module
from mlpipes.store.lease import Lease
from mlpipes_tests.waiting import until


def test_the_latest_taker_holds_the_lease(tmp_path: Path) -> None:
    first = Lease.take(tmp_path, "first")
    first.check()
    second = Lease.take(tmp_path, "second")
    assert second.token == first.token + 1
    second.check()
    with pytest.raises(LeaseLostError, match=r"taken over \(token 2, ours 1\)"):
        first.check()
    with pytest.raises(LeaseLostError), first.guarded():
        pytest.fail("a lost lease must not open")
    with second.guarded():
        pass


def _take_many(folder: str, count: int, queue: Any) -> None:
    queue.put([Lease.take(Path(folder), "x").token for _ in range(count)])


def test_no_token_is_given_twice(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    queue = context.Queue()
    takers = [context.Process(target=_take_many, args=(str(tmp_path), 40, queue)) for _ in range(3)]
    for taker in takers:
        taker.start()
    tokens = [token for _ in takers for token in queue.get(timeout=300)]
    for taker in takers:
        taker.join(300)
    assert sorted(tokens) == list(range(1, 121))


def _write_for_ever(folder: str, ready: Any) -> None:
    lease = Lease.take(Path(folder), "sleeper")
    target = Path(folder) / "target"
    while True:
        with lease.guarded():
            target.write_text("sleeper")
        ready.set()
        time.sleep(0.01)


def test_a_paused_holder_that_wakes_up_late_cannot_write(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    ready = context.Event()
    sleeper = context.Process(target=_write_for_ever, args=(str(tmp_path), ready))
    sleeper.start()
    assert sleeper.pid is not None
    try:
        assert ready.wait(300)
        # Pause it between two writes: with the lock in its hands it would hold everybody up.
        from filelock import FileLock

        with FileLock(str(tmp_path / "lease.json.lock")):
            os.kill(sleeper.pid, signal.SIGSTOP)
            until(lambda: psutil.Process(sleeper.pid).status() == psutil.STATUS_STOPPED, "it is paused")
        lease = Lease.take(tmp_path, "awake")
        with lease.guarded():
            (tmp_path / "target").write_text("awake")
        os.kill(sleeper.pid, signal.SIGCONT)
        sleeper.join(300)
        assert sleeper.exitcode == 1, "it ended with LeaseLostError"
        assert (tmp_path / "target").read_text() == "awake"
    finally:
        sleeper.kill()


def test_a_corrupt_lease_stops_older_holders(tmp_path: Path) -> None:
    lease = Lease.take(tmp_path, "old")
    lease.path.write_text("{torn")
    with pytest.raises(LeaseLostError):
        lease.check()
    assert (tmp_path / "lease.json.corrupt-1").read_text() == "{torn"
    Lease.take(tmp_path, "new").check()


def test_nobody_takes_the_lease_while_its_holder_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what was checked may be lost by the time that it is written."""
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.1)
    lease = Lease.take(tmp_path, "the first")
    with lease.guarded():
        with (
            ThreadPoolExecutor(1) as another,
            pytest.raises(LeaseLostError, match=r"held for over 0\.1 s by a process that"),
        ):
            another.submit(Lease.take, tmp_path, "the second").result()
        lease.check()
    Lease.take(tmp_path, "the second")
    assert lease.is_lost()
