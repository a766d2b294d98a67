"""A worker's process: which kernels it may use, and what it says of errors that users can cause."""

import multiprocessing as mp
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mlpipes.errors import LeaseLostError, TrainingFailedError
from mlpipes.store.lease import Lease
from mlpipes.training import worker
from mlpipes.training.determinism import prepare_process
from mlpipes.training.loop import Trainer
from mlpipes.training.parallel import SingleWorker
from mlpipes.training.worker import FENCED, end_when_fenced, explained, train
from mlpipes_tests.training.harness import make_job, run_here


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def test_kernels_that_give_other_bits_are_refused_and_not_warned_of() -> None:
    prepare_process(1, 0)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "attention on a GPU would not be deterministic"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
    prepare_process(1, 0, deterministic_kernels=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_hyperparameter_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, bool]] = []
    monkeypatch.setattr(worker, "prepare_process", lambda *arguments: asked.append(arguments))
    for wanted in (True, False):
        run_here(make_job(tmp_path / str(wanted), "w1-b512-e1-g0", deterministic=wanted))
    assert asked == [(1, 0, True), (1, 0, False)]


def test_an_operation_without_a_deterministic_kernel_is_named_with_the_remedy() -> None:
    prepare_process(1, 0)
    with pytest.raises(RuntimeError) as raised:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    assert explained(raised.value).startswith("put_ has no deterministic kernel on this device.")
    assert "`deterministic: false`" in explained(raised.value)


def test_errors_are_explained_or_shown_whole() -> None:
    assert explained(TrainingFailedError("the loss became nan")) == "the loss became nan"
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")
    assert explained(full).startswith("the GPU has not enough memory (CUDA out of memory). Use a smaller batch size")
    assert explained(KeyError("what")).startswith("KeyError: 'what'\n")


def _compute(folder: Path, begun: Any) -> None:
    lease = Lease.take(folder, "the first")
    threading.Thread(target=end_when_fenced, args=(lease, threading.Event()), daemon=True).start()
    begun.set()
    while True:
        torch.ones(300, 300).mm(torch.ones(300, 300))


def test_a_worker_whose_training_was_taken_over_ends_itself_whatever_it_does(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    begun = context.Event()
    process = context.Process(target=_compute, args=(tmp_path, begun))
    process.start()
    try:
        assert begun.wait(300)
        process.join(3)
        assert process.is_alive(), "it has the lease, and goes on"
        Lease.take(tmp_path, "another job")
        process.join(300)
        assert process.exitcode == FENCED
    finally:
        process.kill()


def test_a_fenced_worker_that_is_started_again_says_why_and_does_not_train(tmp_path: Path) -> None:
    job = make_job(tmp_path, "w1-b512-e1-g0")
    lost = Lease.take(job.folder.path, "the first")
    Lease.take(job.folder.path, "another job")
    with pytest.raises(LeaseLostError, match="taken over"):
        train(job, SingleWorker(), torch.device("cpu"), lost)
    assert not job.folder.checkpoints.exists()


def test_a_worker_that_is_fenced_while_it_trains_writes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a checkpoint nor a result: whoever took over writes there now."""
    job = make_job(tmp_path, "w1-b512-e1-g0", every_steps=1)
    lease, folder = Lease.take(job.folder.path, "the first"), job.folder.checkpoints
    step, seen = Trainer._step, list[str]()

    def step_and_lose(trainer: Trainer) -> None:
        step(trainer)
        if trainer.progress.step == 2:
            trainer.writer.wait()
            seen[:] = sorted(path.name for path in folder.iterdir())
            Lease.take(job.folder.path, "another job")

    monkeypatch.setattr(Trainer, "_step", step_and_lose)
    with pytest.raises(LeaseLostError, match="taken over"):
        train(job, SingleWorker(), torch.device("cpu"), lease)
    assert seen
    assert sorted(path.name for path in folder.iterdir()) == seen
    assert not job.folder.result.exists()
