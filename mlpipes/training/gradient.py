"""The gradient of a global batch, computed over all workers.

A global batch is divided into a fixed number of *logical shards*, independent of the number of workers. Each worker
computes the gradients of its shards one by one, each for itself, and

- `ordered` (the default) adds them up in the order of one fixed tree, whoever computed them, so 1, 2, 3 or 4 workers end
  in the same bits, and a training may lose or gain workers;
- `allreduce` sums over workers in the backend's order: between machines, one exchange also for more than two workers, and
  no more to send where a share is several subtrees; equal to rounding between numbers of workers, and exactly
  repeatable with the same number. (DDP's gradient buckets are rebuilt after the first step, which makes a resumed
  training differ in the last bits.)

The loss is a mean over the global batch: the sum of the losses over the sum of what the samples count. How much that is
may be known only after the forward pass, so losses are divided by the number of samples on their way, and their sum by
what a sample counts on average at the end. Where each sample counts one, that is 1.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn

from mlpipes.errors import TrainingFailedError
from mlpipes.training.embedding import SparseReadEmbedding, TableGradient
from mlpipes.training.parallel import Workers, shares
from mlpipes.training.reduction import TreeReduction, TreeSum
from mlpipes.training.running_statistics import RunningStatistics
from mlpipes.training.shared_memory import SharedMemoryReduction

ShardLosses = Callable[[int, Tensor], Iterable[tuple[Tensor, Tensor | float]]]
"""For a shard's number and rows (B,): of each of its parts, one after the other, the summed losses and what they count."""


@dataclass
class Sums:
    """What is summed over shards: tensors, and gradients of tables of which only some rows were read."""

    tensors: list[Tensor]
    tables: list[TableGradient]

    def plus(self, other: "Sums") -> "Sums":
        """The sum of both; takes the memory of this one."""
        for mine, others in zip(self.tensors, other.tensors, strict=True):
            mine.add_(others)
        return Sums(self.tensors, [a.plus(b) for a, b in zip(self.tables, other.tables, strict=True)])

    def size(self, read: Sequence[Tensor]) -> int:
        """Numbers in a row of memory, where `read` are the rows of each table that it has room for."""
        widths = (table.values.shape[1] for table in self.tables)
        return sum(t.numel() for t in self.tensors) + sum(len(r) * w for r, w in zip(read, widths, strict=True))

    def write(self, memory: Tensor, read: Sequence[Tensor]) -> None:
        """Into a row of memory."""
        there = self.placed(memory, read)
        for mine, place in zip(self.tensors, there.tensors, strict=True):
            place.copy_(mine)
        for mine, place in zip(self.tables, there.tables, strict=True):
            place.values.zero_()[torch.searchsorted(place.rows, mine.rows)] = mine.values

    def placed(self, memory: Tensor, read: Sequence[Tensor]) -> "Sums":
        """Views into a row of memory where such sums lie."""
        offset, tensors, tables = 0, [], []
        for tensor in self.tensors:
            # Its shape *and strides*: fused optimizers walk parameter and gradient in memory order, so the gradient of a
            # channels_last weight must be channels_last too; else they update the wrong elements without a word.
            tensors.append(memory.as_strided(tensor.shape, tensor.stride(), memory.storage_offset() + offset))
            offset += tensor.numel()
        for table, rows in zip(self.tables, read, strict=True):
            width = table.values.shape[1]
            tables.append(TableGradient(rows, memory[offset : offset + len(rows) * width].view(len(rows), width)))
            offset += len(rows) * width
        return Sums(tensors, tables)


class ShardedGradient:
    """Computes the gradient of a global batch over all workers and leaves it in the parameters' `.grad`."""

    def __init__(
        self,
        model: nn.Module,
        workers: Workers,
        shards: int,
        reduction: Literal["ordered", "allreduce"],
        weighted: bool = False,
    ) -> None:
        """`weighted`: that samples may count other than 1.

        Raises ValueError for more workers than shards, TrainingFailedError for a model without weights to train, or with
        such in another precision than float32.
        """
        if workers.size > shards:
            raise ValueError(f"{workers.size} workers cannot share {shards} logical shards; raise logical_shards")
        self.workers, self.shards, self.reduction, self.weighted = workers, shards, reduction, weighted
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise TrainingFailedError("the model has no weights to train: none has requires_grad")
        if other := [f"{name!r} is {p.dtype}" for name, p in trained.items() if p.dtype != torch.float32]:
            raise TrainingFailedError(
                f"weights that are trained must be float32, but {other[0]}. Gradients travel as float32; for faster steps "
                "set `precision: bf16`, which keeps the weights as they are. Frozen weights may be of any type."
            )
        self.parameters = list(trained.values())
        self._share = shares(shards, workers.size)[workers.rank]
        self._statistics = RunningStatistics(model)
        self._embeddings = [m for m in model.modules() if isinstance(m, SparseReadEmbedding)]
        self._device = self.parameters[0].device
        self._tree: TreeReduction | None = None

    def compute(self, rows: Tensor, shard_losses: ShardLosses) -> Tensor:
        """Set the gradient of the mean loss over `rows` (B,); returns that mean loss and what the batch counts, (2,).

        `shard_losses` is called for this worker's shards only; gradients accumulate over a shard's parts. Where nothing
        counts, the loss is NaN and the gradient not finite.
        """
        parts = torch.tensor_split(rows, self.shards)
        sums = TreeSum[Sums](self.shards, Sums.plus)
        self._statistics.begin()
        for shard in self._share:
            self._statistics.restore()
            for parameter in self.parameters:
                parameter.grad = None
            figures = self._backward(shard_losses(shard, parts[shard]), len(rows))
            sums.push(range(shard, shard + 1), self._taken(figures))
        total = self._over_workers([found for _, found in sums.roots])
        return self._spread(total, len(rows))

    def _backward(self, parts: Iterable[tuple[Tensor, Tensor | float]], batch_size: int) -> Tensor:
        """Accumulate the gradients of a shard's parts; returns their share of the mean loss and what they count, (2,)."""
        figures = torch.zeros(2, device=self._device)
        for loss, weight in parts:
            mean = loss / batch_size
            mean.backward()
            figures[0] += mean.detach()
            figures[1] += weight
        return figures

    def _sparse(self) -> list[SparseReadEmbedding]:
        return [m for m in self._embeddings if type(m) is SparseReadEmbedding]

    def _dense(self) -> list[nn.Parameter]:
        tables = {id(module.weight) for module in self._sparse()}
        return [p for p in self.parameters if id(p) not in tables]

    def _taken(self, figures: Tensor) -> Sums:
        """A shard's gradients, taken from the parameters, its running statistics and its figures."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._dense()]
        statistics = [buffer.clone() for buffer in self._statistics.averaged]
        return Sums([*gradients, *statistics, figures], [module.take() for module in self._sparse()])

    def _over_workers(self, roots: list[Sums]) -> Sums:
        """The sum over all workers, given this one's subtrees."""
        if self.workers.size == 1:
            return roots[0]
        if self.reduction == "allreduce":
            roots = [reduce(Sums.plus, roots)]
        read = self._read_by_anyone(roots)
        tree, memory = self._rows(len(roots), roots[0].size(read))
        for row, root in zip(memory, roots, strict=True):
            root.write(row, read)
        total = self.workers.sum(memory[0]) if self.reduction == "allreduce" else tree.sum(memory)
        return roots[0].placed(total, read)

    def _rows(self, count: int, size: int) -> tuple[TreeReduction, Tensor]:
        """How roots are added up, and the memory to write them to."""
        shared = self.reduction == "ordered" and self._device.type == "cpu"
        if shared and (self._tree is None or isinstance(self._tree, SharedMemoryReduction)):
            # Not before: all workers come here at the same time, and a dry run on one of them does not.
            with suppress(OSError):  # on all of them: on several machines, in several containers, or at a limit
                self._tree = self._tree or SharedMemoryReduction(self.workers, self.shards)
                return self._tree, self._tree.rows(count, size)
            self._tree = None
        self._tree = self._tree or TreeReduction(self.workers, self.shards, self._device)
        return self._tree, self._tree.rows(count, size)

    def _read_by_anyone(self, roots: Sequence[Sums]) -> list[Tensor]:
        """The rows of each table that any worker has read: all that needs to travel."""
        modules = self._sparse()
        if not modules:
            return []
        hits = [torch.zeros(len(m.weight), dtype=torch.int32, device=self._device) for m in modules]
        for root in roots:
            for hit, table in zip(hits, root.tables, strict=True):
                hit[table.rows] = 1
        return [hit.nonzero()[:, 0] for hit in self.workers.sum(torch.cat(hits)).split([len(h) for h in hits])]

    def _spread(self, total: Sums, batch_size: int) -> Tensor:
        """Put the sums where they belong; returns the figures."""
        dense = self._dense()
        gradients, statistics, figures = total.tensors[: len(dense)], total.tensors[len(dense) : -1], total.tensors[-1]
        self._statistics.end(statistics, self.shards)
        if self.weighted:
            factor = batch_size / figures[1]
            for tensor in [*gradients, *(table.values for table in total.tables), figures[:1]]:
                tensor.mul_(factor)
        for parameter, gradient in zip(dense, gradients, strict=True):
            parameter.grad = gradient
        for module, table in zip(self._sparse(), total.tables, strict=True):
            module.put(table)
        return figures
