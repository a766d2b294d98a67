"""Embeddings of large vocabularies whose gradient stays in one place, of which a step touches only the rows that it read.

Autograd makes a gradient as large as the table in every step, in memory that the system has just filled with zeros: for
MiniLM 47 MB for some 400 rows that are not zero, an eighth of a step on a CPU. The bits are the same.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LARGE = 1_000_000
"""Elements from which on it is worth while."""


@dataclass(frozen=True)
class TableGradient:
    """The gradient of a table: `rows` int64 (N,), ascending, each once, and their `values` (N, width); else zeros.

    A zero among the values is never -0.0, because they are sums that began with 0.0: so adding a zero to one changes no
    bit, and it makes no difference whether a row is left out or added as zeros.
    """

    rows: Tensor
    values: Tensor

    def plus(self, other: "TableGradient") -> "TableGradient":
        """The sum of both."""
        rows, position = torch.cat([self.rows, other.rows]).unique(return_inverse=True)
        values = self.values.new_zeros(len(rows), self.values.shape[1])
        values[position[: len(self.rows)]] = self.values
        values[position[len(self.rows) :]] += other.values
        return TableGradient(rows, values)


class SparseReadEmbedding(nn.Embedding):
    """An `nn.Embedding` whose backward leaves `weight.grad` alone and adds up the rows read, for `take`.

    `put` sets `weight.grad`, dense, in memory that is kept: setting it to None makes no work.
    """

    _kept: Tensor | None
    _touched: Tensor
    _found: TableGradient
    _nothing: TableGradient

    def begin(self) -> None:
        """Keep nothing yet."""
        self._kept, self._touched = None, torch.empty(0, dtype=torch.int64)
        self._nothing = TableGradient(self._touched, self.weight.new_empty(0, self.embedding_dim))
        self._found = self._nothing
        self.weight.register_hook(self._is_added_to)

    def _is_added_to(self, others: Tensor | None) -> Tensor | None:
        # A table with another use (as the output layer, say) gets a gradient in any row: nothing to gain, now or later.
        if others is None or type(self) is not SparseReadEmbedding:
            return None
        found = self.take()
        self.__class__ = nn.Embedding  # pyright: ignore[reportAttributeAccessIssue]
        self._kept = None
        return others.index_add(0, found.rows, found.values)

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table for ids of any shape."""
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return _Lookup.apply(self.weight, input, self)  # pyright: ignore[reportReturnType]
        return super().forward(input)

    def accumulate(self, ids: Tensor, gradient: Tensor) -> None:
        """Add the gradient of the rows read, ids (N,) and gradient (N, width), to what was found before."""
        rows, position = ids.unique(return_inverse=True)
        values = torch.ops.aten.embedding_dense_backward(gradient, position, len(rows), -1, False)
        if self.padding_idx is not None:
            values[rows == self.padding_idx] = 0
        found = TableGradient(rows, values)
        self._found = found if self._found is self._nothing else self._found.plus(found)

    def take(self) -> TableGradient:
        """What backward passes have found since the last time."""
        found, self._found = self._found, self._nothing
        return found

    def put(self, gradient: TableGradient) -> None:
        """Set `weight.grad`."""
        if self._kept is None:
            self._kept = torch.zeros_like(self.weight)
        self._kept[self._touched] = 0
        self._kept[gradient.rows] = gradient.values
        self._touched, self.weight.grad = gradient.rows, self._kept


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, module: SparseReadEmbedding) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.module = module
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        (ids,), (gradient,) = ctx.saved_tensors, gradients
        ctx.module.accumulate(ids.reshape(-1), gradient.reshape(-1, gradient.shape[-1]))
        return None, None, None


def keep_embedding_gradients(model: nn.Module) -> None:
    """Turn the large embeddings of a model on a CPU into such ones, in place; parameters and their names stay."""
    for module in model.modules():
        if type(module) is not nn.Embedding or module.weight.device.type != "cpu" or module.weight.numel() < _LARGE:
            continue
        if not module.weight.requires_grad or module.sparse or module.scale_grad_by_freq or module.max_norm is not None:
            continue
        module.__class__ = SparseReadEmbedding
        kept: Any = module
        kept.begin()
