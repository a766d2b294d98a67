"""Checkpoints are written beside the training, and nothing that was promised of them is weaker for it."""

import errno
import math
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mlpipes.errors import DiskFullError
from mlpipes.store.messages import CheckpointSaved, MetricsLogged, read_messages
from mlpipes.store.training_job import Checkpointing
from mlpipes.training import disk_full
from mlpipes.training.checkpoint_writer import CheckpointWriter, _HostCopy, seconds_between
from mlpipes.training.checkpoints import Checkpoints, Progress
from mlpipes.training.loop import Trainer
from mlpipes_tests.training.harness import curve, make_job, run, run_here
from mlpipes_tests.waiting import LIMIT_SECONDS

SCALE = "w1-b128-e2-g0"


class Steps:
    """Says where a training is, so that its checkpoints can be held until it is further."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done, self.changed, self.last = 0, threading.Condition(), 0
        step = Trainer._step

        def told(trainer: Trainer) -> None:
            step(trainer)
            with self.changed:
                self.done, self.last = trainer.progress.step, trainer.total_steps
                self.changed.notify_all()

        monkeypatch.setattr(Trainer, "_step", told)

    def wait_for(self, step: int) -> None:
        """Until so many steps are done, or all."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.done >= min(step, self.last), LIMIT_SECONDS), (
                "the training waits for us"
            )


def test_the_training_goes_on_while_its_state_is_written_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_here(make_job(tmp_path / "whole", SCALE))
    job, save = make_job(tmp_path / "held", SCALE, every_steps=4), Checkpoints.save
    with monkeypatch.context() as patch:
        steps = Steps(patch)

        def held(self: Checkpoints, state: Any, optimizers: Any, progress: Progress) -> Path:
            steps.wait_for(progress.step + 1)
            if progress.step == 12:
                raise OSError(errno.EIO, "broken")
            return save(self, state, optimizers, progress)

        patch.setattr(Checkpoints, "save", held)
        with pytest.raises(OSError, match="broken"):
            run_here(job)
    outcome = run_here(job)
    assert outcome["resumed_from_step"] == 9, "the end of the first epoch"
    assert outcome["weights_digest"] == whole["weights_digest"]
    assert curve(outcome) == curve(whole)


def test_an_error_of_the_writer_is_raised_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, begun, step = make_job(tmp_path, SCALE, every_steps=3), list[int](), Trainer._step

    def after_the_writer(trainer: Trainer) -> None:
        begun.append(trainer.progress.step)
        step(trainer)
        if (pending := trainer.writer._pending) is not None:
            pending.exception(LIMIT_SECONDS)

    def broken(*_: Any) -> Path:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(Trainer, "_step", after_the_writer)
    monkeypatch.setattr(Checkpoints, "save", broken)
    with pytest.raises(OSError, match="broken"):
        run_here(job)
    assert begun == [0, 1, 2, 3]
    assert not job.folder.result.exists()


def test_metrics_are_told_only_when_a_checkpoint_that_carries_them_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, save, seen = make_job(tmp_path, SCALE, every_steps=2), Checkpoints.save, list[int]()

    def watched(self: Checkpoints, state: Any, optimizers: Any, progress: Progress) -> Path:
        messages, _ = read_messages(job.folder.messages(1))
        told = [row[2] for message in messages if isinstance(message, MetricsLogged) for row in message.rows]
        saved = [message.step for message in messages if isinstance(message, CheckpointSaved)]
        assert max(told, default=0) <= max(saved, default=0) <= max(self.steps(), default=0) < progress.step
        seen.append(progress.step)
        return save(self, state, optimizers, progress)

    monkeypatch.setattr(Checkpoints, "save", watched)
    outcome = run_here(job)
    assert seen == sorted({*range(2, outcome["steps"] + 1, 2), 9, 18})
    messages, _ = read_messages(job.folder.messages(1))
    told = [list(row) for message in messages if isinstance(message, MetricsLogged) for row in message.rows]
    assert told == outcome["history"], "each once, to the last"


def test_a_killed_writer_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    whole, job = run(make_job(tmp_path / "whole", SCALE)), make_job(tmp_path / "killed", SCALE, every_steps=4)
    run(job, crash=8, torn=True)
    (unfinished,) = job.folder.checkpoints.glob(".tmp-*")
    assert (unfinished / "optimizers.pt").stat().st_size == 100, "it was in the middle of a file"
    outcome = run(job)
    assert not list(job.folder.checkpoints.glob(".tmp-*"))
    assert outcome["resumed_from_step"] == 4
    assert outcome["weights_digest"] == whole["weights_digest"]
    assert curve(outcome) == curve(whole)


def test_a_copy_keeps_the_order_in_memory_and_its_buffers() -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    host, state = _HostCopy(), [optimizer.state_dict()]
    copied = host.of(state)
    for number, entry in state[0]["state"].items():
        mine = copied[0]["state"][number]["momentum_buffer"]
        assert torch.equal(mine, entry["momentum_buffer"])
        assert mine.stride() == entry["momentum_buffer"].stride()
        assert mine.data_ptr() != entry["momentum_buffer"].data_ptr()
    assert copied[0]["param_groups"] == state[0]["param_groups"]
    again = host.of(state)
    assert again[0]["state"][0]["momentum_buffer"].data_ptr() == copied[0]["state"][0]["momentum_buffer"].data_ptr()
    assert host.nbytes == 4 * (4 * 3 * 3 * 3 + 4)


def test_what_is_shared_is_shared_in_the_copy() -> None:
    counter, other = torch.tensor(3.0), torch.tensor(3.0)
    copied = _HostCopy().of([{"step": counter}, {"step": counter}, {"step": other}])
    copied[0]["step"].add_(1)
    assert [float(state["step"]) for state in copied] == [4.0, 4.0, 3.0]
    assert float(counter) == 3.0


def test_views_of_one_memory_are_that_in_the_copy() -> None:
    flat = torch.arange(6.0)
    state = {"flat": flat, "m": flat[:3], "v": flat[3:].view(3, 1), "wide": torch.ones(1).expand(4)}
    copied = _HostCopy().of(state)
    flat.fill_(9)
    copied["flat"].mul_(2)
    assert copied["m"].tolist() == [0, 2, 4]
    assert copied["v"].tolist() == [[6], [8], [10]]
    assert copied["wide"].stride() == (0,)


def test_a_tensor_of_another_order_in_memory_takes_the_place_of_the_one_before() -> None:
    host, image = _HostCopy(), torch.rand(2, 3, 4, 4)
    for tensor in (image, image.to(memory_format=torch.channels_last)):
        copied = host.of([tensor])[0]
        assert torch.equal(copied, tensor)
        assert copied.stride() == tensor.stride()


def test_at_the_end_of_its_process_a_training_in_another_thread_does_not_fail(tmp_path: Path) -> None:
    """Ray trains in a thread, and ends a worker by an exit in its main thread: that is no error of the training's."""
    program = f"""
import atexit, sys, threading, time, torch
from contextlib import nullcontext
from pathlib import Path
from mlpipes.training.checkpoint_writer import CheckpointWriter
from mlpipes.training.checkpoints import Checkpoints, Progress
writer = CheckpointWriter(Checkpoints(Path({str(tmp_path)!r})), lambda _: None, nullcontext)
saved, after = [], threading.Event()
def train():
    try:
        for step in range(1, 10**6):
            writer.save({{"w": torch.ones(3)}}, [], Progress(step=step))
            saved.append(step)
            if len(saved) > exiting.get("at", 10**9) + 3:
                after.set()
                return
    except Exception as error:
        print("failed", error, flush=True); after.set()
exiting = {{}}
trains = threading.Thread(target=train, daemon=True)
trains.start()
while len(saved) < 3: time.sleep(0.001)
def last():
    exiting["at"] = len(saved)
    went_on = after.wait({LIMIT_SECONDS})
    trains.join()
    writer.close()  # what computes while the interpreter ends may crash it, which is not what is looked at
    print("went on" if went_on else "stood still", flush=True)
atexit.register(last)
sys.exit(3)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=2 * LIMIT_SECONDS)
    assert (done.returncode, done.stdout) == (3, "went on\n"), done.stderr


def test_who_closes_it_does_not_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = threading.Event()

    def full(*_: Any) -> Path:
        tried.set()
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Checkpoints, "save", full)
    monkeypatch.setattr(disk_full, "RETRY_SECONDS", 10_000.0)
    writer = CheckpointWriter(Checkpoints(tmp_path), lambda _: None, nullcontext)
    writer.save({}, [], Progress(step=1))
    assert tried.wait(LIMIT_SECONDS)
    writer.close()
    with pytest.raises(DiskFullError, match="is full"):
        writer.wait()


@pytest.mark.parametrize(
    ("policy", "cost", "seconds"),
    [
        ({}, None, 60.0),
        ({}, 5.0, 60.0),
        ({"every_seconds": None}, 5.0, math.inf),
        ({"mean_seconds_between_failures": 3600.0}, None, 60.0),
        ({"mean_seconds_between_failures": 3600.0}, 2.0, 120.0),
        ({"mean_seconds_between_failures": 1.0}, 2.0, 10.0),  # no sooner than the last one is written
    ],
)
def test_the_interval_is_youngs(policy: dict[str, Any], cost: float | None, seconds: float) -> None:
    assert seconds_between(Checkpointing(**policy), cost, write_seconds=10.0) == seconds


def test_costs_are_measured(tmp_path: Path) -> None:
    model = nn.Linear(1000, 1000)
    writer = CheckpointWriter(Checkpoints(tmp_path), lambda _: None, nullcontext)
    writer.save(model.state_dict(), [], Progress(step=1))
    writer.wait()
    writer.close()
    assert writer.cost_seconds is not None
    assert writer.cost_seconds > 0
    assert writer.write_seconds > 0
