"""Heartbeats: how long one stands still, by our own clock."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlpipes.store import heartbeat
from mlpipes.store.heartbeat import Pulse


def test_silence_is_counted_from_the_last_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, path = [100.0], tmp_path / "a1.heartbeat"
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    pulse = Pulse(path)

    def after(seconds: float, *, waits: bool = False) -> float:
        clock[0] += seconds
        return pulse.silence(waits=waits)

    assert after(1000) == 0, "before the first beat"
    path.touch()
    assert after(5) == 0
    assert after(5) == 5
    assert after(7) == 12
    os.utime(path, ns=(1, 1))  # another machine's clock may lie in the past
    assert after(1) == 0
    assert after(50, waits=True) == 0, "its job was put back into the queue"
    assert after(2) == 2


def test_a_driver_that_never_comes_is_dead_but_not_while_its_job_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, path = [100.0], tmp_path / "a1.heartbeat"
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    pulse = Pulse(path)

    def after(seconds: float, *, waits: bool = False) -> bool:
        clock[0] += seconds
        return pulse.is_dead(waits=waits)

    assert not after(5000, waits=True), "in a queue"
    assert not after(890), "it starts"
    assert after(20)
    path.touch()
    assert not after(5000), "it has come after all"
    assert not after(29)
    assert after(2)
