"""A worker's process: which kernels it may use, and what it says of errors that users can cause."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mlpipes.errors import TrainingFailedError
from mlpipes.training import worker
from mlpipes.training.determinism import prepare_process
from mlpipes.training.worker import explained
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
