"""Running a model over a whole split, shared between workers, with results that do not depend on who computed them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlpipes.training.parallel import Workers, shares
from mlpipes.workloads.base import Workload
from mlpipes.workloads.tensors import TensorColumns, autocast, each_row

BATCH_SIZE = 500
"""Samples per forward pass. Fixed, because the bits of a convolution may depend on the size of its batch."""
BATCH_COST = 16384
"""Padded tokens per forward pass at most, where samples have lengths."""


@torch.no_grad()
def predictions_of(
    workload: Workload,
    model: nn.Module,
    columns: TensorColumns,
    hp: Any,
    workers: Workers,
    precision: str,
) -> dict[str, np.ndarray]:
    """The model's predictions for every row of `columns`, in row order, on every worker.

    The batches are the same for any number of workers; each worker computes a consecutive share of them.
    """
    device = next(model.parameters()).device
    batches = _batches(len(next(iter(columns.values()))), workload.lengths(columns))
    mine = shares(len(batches), workers.size)[workers.rank]
    was_training = model.training
    model.eval()
    outputs: list[dict[str, Tensor]] = []
    # A worker without a batch of its own still needs the outputs' shapes to take part in the exchange.
    for number in mine or range(1):
        for part in workload.micro_batches(columns, batches[number], hp):
            batch = workload.batch(columns, part, hp, augment=False)
            with autocast(device, precision):
                outputs.append(each_row("predict", workload.predict(model, batch, hp), len(part)))
    model.train(was_training)
    bounds = [
        len(torch.cat([batches[n] for n in share])) if share else 0 for share in shares(len(batches), workers.size)
    ]
    result = {}
    for name in outputs[0]:
        own = torch.cat([output[name] for output in outputs])[: bounds[workers.rank]]
        padded = own.new_zeros(max(bounds), *own.shape[1:])
        padded[: len(own)] = own
        parts = workers.gather(padded)
        found = torch.cat([part[:count] for part, count in zip(parts, bounds, strict=True)]).cpu().numpy()
        result[name] = np.empty_like(found)
        result[name][torch.cat(batches).numpy()] = found
    return result


@torch.no_grad()
def outputs_of(
    workload: Workload, model: nn.Module, columns: TensorColumns, rows: Tensor, hp: Any, precision: str
) -> dict[str, np.ndarray]:
    """The model's `outputs` for a few rows (B,) of `columns`, in their order."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    found: list[dict[str, Tensor]] = []
    for part in workload.micro_batches(columns, rows, hp):
        batch = workload.batch(columns, part, hp, augment=False)
        with autocast(device, precision):
            found.append(each_row("outputs", workload.outputs(model, batch, hp), len(part)))
    model.train(was_training)
    return {name: torch.cat([each[name] for each in found]).cpu().numpy() for name in found[0]}


def _batches(rows: int, lengths: np.ndarray | None) -> list[Tensor]:
    """Rows of each forward pass: consecutive ones, or those of like length, the shortest first."""
    if lengths is None:
        return list(torch.arange(rows).split(BATCH_SIZE))
    order, batches, start = np.argsort(lengths, kind="stable"), [], 0
    while start < rows:
        end = start + 1
        while end < rows and end - start < BATCH_SIZE and (end + 1 - start) * lengths[order[end]] <= BATCH_COST:
            end += 1
        batches.append(torch.from_numpy(order[start:end].copy()))
        start = end
    return batches
