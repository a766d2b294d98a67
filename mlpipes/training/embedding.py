"""Embeddings of large vocabularies whose gradient stays in one place, of which a step touches only the rows that it read.

Autograd makes a gradient as large as the table in every step, in memory that the system has just filled with zeros: for
MiniLM 47 MB for some 400 rows that are not zero, an eighth of a step on a CPU. The bits are the same.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LARGE = 1_000_000
"""Elements from which on it is worth while."""


class SparseReadEmbedding(nn.Embedding):
    """An `nn.Embedding` whose backward writes `weight.grad` itself, dense, into memory that it keeps.

    Whoever sets `weight.grad` to None gives this memory back.
    """

    _kept: Tensor | None
    _touched: Tensor

    def begin(self) -> None:
        """Keep nothing yet."""
        self._kept, self._touched = None, torch.empty(0, dtype=torch.int64)
        self.weight.register_hook(self._is_added_to)

    def _is_added_to(self, others: Tensor | None) -> None:
        # A table with another use (as the output layer, say) gets a gradient in any row: nothing to keep, now or later.
        if others is not None:
            self.__class__ = nn.Embedding  # pyright: ignore[reportAttributeAccessIssue]
            self._kept = None

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table for ids of any shape."""
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return _Lookup.apply(self.weight, input, self)  # pyright: ignore[reportReturnType]
        return super().forward(input)

    def accumulate(self, ids: Tensor, gradient: Tensor) -> None:
        """Add the gradient of the rows read, ids (N,) and gradient (N, width), to that of the table."""
        rows, position = ids.unique(return_inverse=True)
        found = torch.ops.aten.embedding_dense_backward(gradient, position, len(rows), -1, False)
        if self.padding_idx is not None:
            found[rows == self.padding_idx] = 0
        if self.weight.grad is not None:
            self.weight.grad[rows] += found
            # The memory may be ours, and then these rows are to be cleared too.
            self._touched = torch.cat([self._touched, rows])
            return
        if self._kept is None:
            self._kept = torch.zeros_like(self.weight)
        self._kept[self._touched] = 0
        self._kept[rows] = found
        self._touched, self.weight.grad = rows, self._kept


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
