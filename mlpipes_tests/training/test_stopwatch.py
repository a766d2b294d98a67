"""The stopwatch: what counts, and how busy a GPU was."""

import pytest
import torch

from mlpipes.training import stopwatch
from mlpipes.training.stopwatch import Stopwatch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_only_what_is_between_begin_and_lap_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = {"perf_counter": 1000.0, "process_time": 10.0}
    for name in clocks:
        monkeypatch.setattr(stopwatch.time, name, lambda name=name: clocks[name])
    watch = Stopwatch(CPU)
    clocks["perf_counter"] += 100
    clocks["process_time"] += 50
    watch.begin()
    clocks["perf_counter"] += 4
    clocks["process_time"] += 3
    assert watch.lap() == watch.wall == 4
    clocks["perf_counter"] += 1
    watch.lap()
    assert (watch.wall, watch.cpu) == (5, 3)
    busy, resident, on_gpu, gpu_busy = watch.usage().tolist()
    assert busy == pytest.approx(3 / 5)
    assert resident > 2**26, "torch alone takes more"
    assert on_gpu == 0
    assert gpu_busy != gpu_busy, "not a number: there is no GPU"


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that goes on by a quarter of a second a lap."""
    now = [0.0]

    def tick() -> float:
        now[0] += 0.25
        return now[0]

    monkeypatch.setattr(stopwatch.time, "perf_counter", tick)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch, "tensor", lambda values, dtype, device: values)
    return now


def test_a_gpu_is_asked_once_a_second(monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> None:
    percents = iter([40, 80, 90])
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: next(percents))
    watch = Stopwatch(GPU)
    for _ in range(12):
        watch.lap()
    assert watch.usage()[2:] == [5, pytest.approx(0.6)], "two samples in three seconds"


def test_a_gpu_of_which_nothing_is_known_ends_no_training(
    monkeypatch: pytest.MonkeyPatch, seconds: list[float]
) -> None:
    asked = []

    def refuse(device: torch.device) -> int:
        asked.append(device)
        raise RuntimeError("Not Supported")

    monkeypatch.setattr(torch.cuda, "utilization", refuse)
    watch = Stopwatch(GPU)
    for _ in range(20):
        watch.lap()
    assert len(asked) == 1
    assert watch.usage()[3] != watch.usage()[3]
