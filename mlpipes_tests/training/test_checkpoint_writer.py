"""Checkpoints are written beside the training, and nothing that was promised of them is weaker for it."""

import errno
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mlpipes.store.messages import CheckpointSaved, MetricsLogged, read_messages
from mlpipes.store.training_job import Checkpointing
from mlpipes.training.checkpoint_writer import CheckpointWriter, _HostCopy, seconds_between
from mlpipes.training.checkpoints import Checkpoints, Progress
from mlpipes.training.loop import Trainer
from mlpipes_tests.training.harness import curve, make_job, run, run_here

SCALE = "w1-b128-e2-g0"
LIMIT = 60.0
"""Seconds for what takes milliseconds."""


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
            assert self.changed.wait_for(lambda: self.done >= min(step, self.last), LIMIT), "the training waits for us"


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
            pending.exception(LIMIT)

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
    writer = CheckpointWriter(Checkpoints(tmp_path), lambda _: None, _Anybody)
    writer.save(model.state_dict(), [], Progress(step=1))
    writer.wait()
    writer.close()
    assert writer.cost_seconds is not None
    assert writer.cost_seconds > 0
    assert writer.write_seconds > 0


class _Anybody:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...
