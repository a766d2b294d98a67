"""Data parallelism: who computes which part of a global batch, and how gradients become one.

A global batch is divided into a fixed number of *logical shards*, independent of the number of workers. Each worker
computes the gradients of its shards one by one, and

- `ordered` (the default) gathers them and adds them up in shard order. Floating-point addition happens in the same order
  whoever computed the parts, so 1, 2 or 4 workers end in the same bits, and a training may lose or gain workers.
- `allreduce` adds the worker's own shards, then sums over workers with one flat all-reduce in fixed parameter order.
  Less traffic and memory; equal to rounding between numbers of workers, and exactly repeatable with the same number.
  (DDP's gradient buckets are rebuilt after the first step, which makes a resumed training differ in the last bits.)

Batch normalisation sees one shard at a time ("ghost batches", Hoffer et al. 2017, arXiv:1705.08741); its running
statistics are averaged over shards in the same way as gradients, so they too are the same on every worker.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Workers(Protocol):
    """The group of processes that train together."""

    rank: int
    size: int

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every worker's tensor (all of one shape and dtype), by rank, on every worker."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over workers, in place, on every worker."""
        ...


class SingleWorker:
    """The group of one: no communication."""

    rank = 0
    size = 1

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Its own tensor."""
        return [tensor]

    def sum(self, tensor: Tensor) -> Tensor:
        """Its own tensor."""
        return tensor


class ProcessGroup:
    """The default process group of torch.distributed: gloo on CPU, nccl on GPU."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._through_host = dist.get_backend() == "gloo"

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every worker's tensor, by rank."""
        # gloo gathers in host memory only; it is also what workers that share one GPU use.
        sent = tensor.cpu() if self._through_host else tensor
        gathered = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(gathered, sent)
        return [part.to(tensor.device) for part in gathered]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over workers, in place."""
        dist.all_reduce(tensor)
        return tensor


def shares(parts: int, workers: int) -> list[range]:
    """Consecutive part numbers for each worker, as equal as can be, the larger shares first."""
    least, extra = divmod(parts, workers)
    bounds = [rank * least + min(rank, extra) for rank in range(workers + 1)]
    return [range(bounds[rank], bounds[rank + 1]) for rank in range(workers)]


class ShardedGradient:
    """Computes the gradient of a global batch over all workers and leaves it in the parameters' `.grad`."""

    def __init__(
        self, model: nn.Module, workers: Workers, shards: int, reduction: Literal["ordered", "allreduce"]
    ) -> None:
        if workers.size > shards:
            raise ValueError(f"{workers.size} workers cannot share {shards} logical shards; raise logical_shards")
        self.workers, self.shards, self.reduction = workers, shards, reduction
        self.shares = shares(shards, workers.size)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.averaged = [b for b in model.buffers() if b.is_floating_point()]
        self.counted = [b for b in model.buffers() if not b.is_floating_point()]
        self._gradient_size = sum(p.numel() for p in self.parameters)
        size = self._gradient_size + sum(b.numel() for b in self.averaged) + 1
        device = self.parameters[0].device
        # One row a shard: gradients, then buffers, then the loss. Workers with a smaller share leave rows zero.
        self._rows = torch.zeros(len(self.shares[0]) if workers.size > 1 else 0, size, device=device)
        self._total = torch.zeros(size if workers.size > 1 else 0, device=device)

    def compute(self, rows: Tensor, shard_losses: Callable[[int, Tensor], Iterable[Tensor]]) -> Tensor:
        """Set the gradient of the mean loss over `rows` (B,) and return that mean loss, a scalar tensor.

        `shard_losses(shard, rows)` gives the summed losses of the parts of one shard, one after the other; gradients
        accumulate over them. It is called for this worker's shards only.
        """
        parts = torch.tensor_split(rows, self.shards)
        if self.workers.size == 1:
            return self._alone(rows, parts, shard_losses)
        before = [b.clone() for b in self.averaged], [b.clone() for b in self.counted]
        for slot, shard in enumerate(self.shares[self.workers.rank]):
            for parameter in self.parameters:
                parameter.grad = None
            self._restore(*before)
            loss = self._backward(shard_losses(shard, parts[shard]), len(rows))
            self._fill(self._rows[slot], loss)
        total = self._reduced()
        self._spread(total)
        return total[-1]

    def _alone(
        self, rows: Tensor, parts: Sequence[Tensor], shard_losses: Callable[[int, Tensor], Iterable[Tensor]]
    ) -> Tensor:
        """The same sums in the same order, left to autograd, which adds each shard's gradient to that of those before."""
        before = [b.clone() for b in self.averaged], [b.clone() for b in self.counted]
        sums: list[Tensor] = []
        for parameter in self.parameters:
            parameter.grad = None
        for shard, part in enumerate(parts):
            self._restore(*before)
            found = [self._backward(shard_losses(shard, part), len(rows)), *(b / self.shards for b in self.averaged)]
            sums = [total + value for total, value in zip(sums, found, strict=True)] if sums else found
        for buffer, total in zip(self.averaged, sums[1:], strict=True):
            buffer.copy_(total)
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return sums[0]

    @staticmethod
    def _backward(losses: Iterable[Tensor], batch_size: int) -> Tensor:
        """Accumulate the gradients of the parts of a shard; returns their share of the mean loss."""
        total = torch.zeros(())
        for loss in losses:
            mean = loss / batch_size
            mean.backward()
            total = total.to(mean.device) + mean.detach()
        return total

    def _restore(self, averaged: Sequence[Tensor], counted: Sequence[Tensor]) -> None:
        for buffer, old in zip([*self.averaged, *self.counted], [*averaged, *counted], strict=True):
            buffer.copy_(old)

    def _fill(self, row: Tensor, mean_loss: Tensor) -> None:
        offset = 0
        for parameter in self.parameters:
            part = _shaped(row, offset, parameter)
            if parameter.grad is None:
                part.zero_()
            else:
                part.copy_(parameter.grad)
            offset += parameter.numel()
        for buffer in self.averaged:
            torch.div(buffer.reshape(-1), self.shards, out=row[offset : offset + buffer.numel()])
            offset += buffer.numel()
        row[-1] = mean_loss

    def _reduced(self) -> Tensor:
        mine = self._rows[: len(self.shares[self.workers.rank])]
        if self.reduction == "ordered":
            gathered = self.workers.gather(self._rows)
            ordered = [gathered[rank][slot] for rank, share in enumerate(self.shares) for slot in range(len(share))]
        else:
            ordered = list(mine)
        total = self._total.copy_(ordered[0])
        for row in ordered[1:]:
            total += row
        return total if self.reduction == "ordered" else self.workers.sum(total)

    def _spread(self, total: Tensor) -> None:
        offset = 0
        for parameter in self.parameters:
            parameter.grad = _shaped(total, offset, parameter)
            offset += parameter.numel()
        for buffer in self.averaged:
            buffer.copy_(total[offset : offset + buffer.numel()].view_as(buffer))
            offset += buffer.numel()


def _shaped(flat: Tensor, offset: int, like: Tensor) -> Tensor:
    """A view into a flat tensor with the shape *and the strides* of another.

    Fused optimizers walk parameter and gradient in memory order, so the gradient of a channels_last weight must be
    channels_last too; with the wrong strides they update the wrong elements without a word.
    """
    return flat.as_strided(like.shape, like.stride(), flat.storage_offset() + offset)
