"""The pool: which of its workers hangs, with a part in hand or while it loads the model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from mlpipes.video import pool
from mlpipes.video.job import Plan
from mlpipes.video.pool import ENCODE, UPSCALE, Pool, Todo
from mlpipes_tests.video.made import job_of, write_video

NOW = 10_000.0


@pytest.mark.parametrize(
    ("slowest", "held", "hangs"),
    [
        ({}, 3500, False),
        ({}, 3700, True),
        ({ENCODE: 1.0}, 3500, False),  # of another kind: it says nothing of how long a chunk takes
        ({ENCODE: 1.0}, 3700, True),
        ({UPSCALE: 1.0}, 290, False),
        ({UPSCALE: 1.0}, 310, True),
        ({UPSCALE: 100.0}, 1900, False),
        ({UPSCALE: 100.0}, 2100, True),
    ],
)
def test_a_worker_that_holds_its_part_for_too_long_is_ended_once(
    slowest: dict[str, float], held: float, hangs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Any] = []
    monkeypatch.setattr(ray, "kill", ended.append)
    monkeypatch.setattr(pool, "time", SimpleNamespace(monotonic=lambda: NOW))
    warnings: list[str] = []
    job = job_of(write_video(tmp_path / "x.mp4", 8), tmp_path / "store")
    made = Pool(job, tmp_path / "a1.json", Plan(frames=8, chunk=4, mended=0), warnings.append)
    made._busy = {"old": ("hanging", (UPSCALE, 0)), "new": ("busy", (UPSCALE, 1)), "start": ("starting", None)}
    made._began = {"old": NOW - held, "new": NOW}
    made._slowest = slowest
    made._end_what_hangs()
    made._end_what_hangs()  # until Ray tells that it has ended
    assert ended == ["hanging"] * hangs
    assert len(warnings) == hangs
    assert not warnings or "a worker hangs: it had its part in hand for" in warnings[0]


def test_a_worker_that_loads_the_model_for_too_long_is_ended_and_one_that_waits_for_a_place_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Any] = []
    monkeypatch.setattr(ray, "kill", ended.append)
    monkeypatch.setattr(pool, "time", SimpleNamespace(monotonic=lambda: NOW))
    warnings: list[str] = []
    job = job_of(write_video(tmp_path / "x.mp4", 8), tmp_path / "store")
    made = Pool(job, tmp_path / "a1.json", Plan(frames=8, chunk=4, mended=0), warnings.append)
    made._busy, made._placing = {"place": ("waiting", None), "load": ("loading", None)}, {"place"}
    made._began = {"load": NOW - 3700}
    made._end_what_hangs()
    assert ended == ["loading"]
    assert "it was loading the model for 3700 s" in warnings[0]


def test_what_workers_say_of_the_model_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "wait", lambda references, timeout: (references, []))
    monkeypatch.setattr(ray, "get", {"a": "slow here", "b": "slow here", "c": ""}.__getitem__)
    warnings: list[str] = []
    job = job_of(write_video(tmp_path / "x.mp4", 8), tmp_path / "store")
    made = Pool(job, tmp_path / "a1.json", Plan(frames=8, chunk=4, mended=0), warnings.append)
    made._busy = {name: (name, None) for name in "abc"}
    idle: list[Any] = []
    made._hear(Todo.of(job, made.plan), idle)
    assert warnings == ["slow here"]
    assert idle == ["a", "b", "c"]
