"""Sums over logical shards as one fixed binary tree, so that their bits do not depend on who computed which shard.

Floating-point addition is commutative but not associative: what must not change is who is added to whom. Shards are the
leaves of a binary tree: neighbours are added, then neighbours of these sums, and so on; an odd one at the end moves up as
it is. Consecutive shards make up a few whole subtrees, most often one. A worker adds these up itself and keeps no more
than one sum a level of the tree; only the subtrees' roots travel, at the traffic of an all-reduce. As a bonus, pairwise
summation rounds less than adding from left to right (Higham 1993).
"""

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

from mlpipes.training.parallel import Workers, shares

T = TypeVar("T")


class TreeSum(Generic[T]):
    """Adds up the values of consecutive leaves as they come, in the order of the tree over `leaves` leaves.

    `add(left, right)` may change its arguments.
    """

    def __init__(self, leaves: int, add: Callable[[T, T], T]) -> None:
        self.leaves, self.add = leaves, add
        self.roots: list[tuple[range, T]] = []
        """The subtrees that are complete and whose siblings have not come yet, from left to right: leaves and their sum."""

    def push(self, span: range, value: T) -> None:
        """The next subtree, a single leaf for instance, and its sum."""
        self.roots.append((span, value))
        while len(self.roots) > 1 and self._siblings(self.roots[-2][0], self.roots[-1][0]):
            (left, a), (right, b) = self.roots[-2:]
            self.roots[-2:] = [(range(left.start, right.stop), self.add(a, b))]

    def _siblings(self, left: range, right: range) -> bool:
        # A left child is complete, so its size is a power of two; at the end of the tree the right one may be smaller.
        size = len(left)
        whole, aligned = size & (size - 1) == 0, left.start % (2 * size) == 0
        return whole and aligned and right.stop == min(left.start + 2 * size, self.leaves)


def subtrees(share: range, leaves: int) -> list[range]:
    """The subtrees that consecutive leaves make up, from left to right; of 8 leaves, 3 to 5 are [3] and [4, 5]."""
    tree = TreeSum[None](leaves, lambda *_: None)
    for leaf in share:
        tree.push(range(leaf, leaf + 1), None)
    return [span for span, _ in tree.roots]


class TreeReduction:
    """Adds up the roots of all workers' subtrees in the order of the tree. Its memory is kept from sum to sum."""

    def __init__(self, workers: Workers, leaves: int, device: torch.device) -> None:
        self.workers, self.leaves, self.device = workers, leaves, device
        self.spans = [subtrees(share, leaves) for share in shares(leaves, workers.size)]
        self._kept: dict[str, Tensor] = {}

    def rows(self, count: int, size: int) -> Tensor:
        """Memory to write `count` roots of `size` numbers to: float32 (count, `size` or some more), of any content."""
        padded = self.padded(size)
        return self.memory("rows", count * padded).view(count, padded)

    def sum(self, rows: Tensor) -> Tensor:
        """The sum over all leaves, on every worker, given this worker's roots in the memory that `rows` gave."""
        size = self.workers.size
        if size == 2 and all(len(spans) == 1 for spans in self.spans):
            return self.workers.sum(rows[0])  # a + b is b + a
        # Each worker adds up one slice of all roots. A worker with fewer subtrees than others has nothing to give then;
        # zeros in its place would turn a sum of -0.0 into 0.0.
        length = rows.shape[1] // size
        arrived: dict[range, Tensor] = {}
        received = self.memory("received", sum(map(len, self.spans)) * length).view(-1, length)
        for number in range(max(map(len, self.spans))):
            given = [spans[number] for spans in self.spans if number < len(spans)]
            slices = received[len(arrived) : len(arrived) + len(given)]
            row = rows[min(number, len(rows) - 1)]
            self.workers.swap(row, slices, [number < len(spans) for spans in self.spans])
            arrived |= dict(zip(given, slices, strict=True))
        self.workers.join(self.added_up(arrived), rows[0])
        return rows[0]

    def padded(self, size: int) -> int:
        """The numbers in a row that is divided evenly among workers."""
        return -(-size // self.workers.size) * self.workers.size

    def added_up(self, roots: Mapping[range, Tensor]) -> Tensor:
        """The sum over all leaves, given every subtree's root; takes their memory."""
        tree = TreeSum[Tensor](self.leaves, lambda left, right: left.add_(right))
        for span in sorted(roots, key=lambda span: span.start):
            tree.push(span, roots[span])
        return tree.roots[0][1]

    def memory(self, name: str, size: int) -> Tensor:
        """Memory for `size` numbers of any content, the same from sum to sum."""
        if name not in self._kept or len(self._kept[name]) < size:
            self._kept[name] = torch.zeros(size, device=self.device)
        return self._kept[name][:size]
