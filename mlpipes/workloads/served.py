"""Forward passes of finished models as they are served: of one shape, on one thread, whoever asks and beside whom."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlpipes.workloads.base import Workload
from mlpipes.workloads.tensors import TensorColumns, autocast, each_row


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, for other numbers of them may give other bits."""
    before = torch.get_num_threads()
    if before != 1:  # which costs a while
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before != 1:
            torch.set_num_threads(before)


def served_rows(workload: Workload, hp: Any) -> int:
    """Samples of a forward pass where a model is served: what its workload says, or fewer where memory is short."""
    return min(workload.served_rows, hp.micro_batch or workload.served_rows)


@torch.no_grad()
def served_predictions(
    workload: Workload, model: nn.Module, columns: TensorColumns, hp: Any, precision: str
) -> dict[str, np.ndarray]:
    """The model's predictions for every row of `columns`, in row order, as they are where it is served.

    In batches of one size and few lengths, on one thread: so no bit of an answer depends on the rows beside it. Raises
    TrainingFailedError for an output of `predict` that has another number of rows.
    """
    device, was_training, size = next(model.parameters()).device, model.training, served_rows(workload, hp)
    rows, lengths = len(next(iter(columns.values()))), workload.lengths(columns)
    alike = np.zeros(rows) if lengths is None else np.array([workload.served_length(int(each)) for each in lengths])
    model.eval()
    found: list[dict[str, Tensor]] = []
    order: list[Tensor] = []
    with one_thread(), autocast(device, precision):  # around all of it, for leaving it forgets the rounded weights
        for length in np.unique(alike):
            for part in torch.from_numpy(np.flatnonzero(alike == length)).split(size):
                with torch.autocast(device.type, enabled=False):
                    batch = workload.served_batch(columns, _filled(part, size), hp)
                outputs = workload.predict(model, batch, hp)
                seen = {name: value[: len(part)] if value.ndim else value for name, value in outputs.items()}
                found.append(each_row("predict", seen, len(part)))
                order.append(part)
    model.train(was_training)
    back = torch.cat(order).argsort()
    return {name: torch.cat([each[name] for each in found]).cpu()[back].numpy() for name in found[0]}


@torch.inference_mode()
def answers_in_batches(program: Callable[[Tensor], Tensor], rows: np.ndarray, size: int) -> np.ndarray:
    """What a program on the CPU answers to raw samples (B, …), of which it is given exactly `size` at a time."""
    answers = []
    with one_thread():
        for part in torch.from_numpy(np.ascontiguousarray(rows)).split(size):
            answer = program(_filled(part, size))[: len(part)]
            answers.append(answer.float() if answer.is_floating_point() else answer)
    return torch.cat(answers).numpy()


class AtPrecision(nn.Module):
    """A module for the CPU that computes at `bf16` or `fp32`, also when it is exported."""

    def __init__(self, module: nn.Module, precision: str) -> None:
        super().__init__()
        self.module, self.precision = module, precision

    def forward(self, samples: Tensor) -> Tensor:
        """The module's answer, float32 where it is no whole number."""
        if self.precision == "fp32":
            return self.module(samples)
        with torch.autocast("cpu", torch.bfloat16):
            answer = self.module(samples)
        return answer.float() if answer.is_floating_point() else answer


def _filled(rows: Tensor, count: int) -> Tensor:
    """Rows (B, …), and copies of the first behind them up to so many."""
    return torch.cat([rows, rows[:1].expand(count - len(rows), *rows.shape[1:])]) if len(rows) < count else rows
