"""Workers: the processes that train together, what they say to each other, and who computes which part of a batch."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Workers(Protocol):
    """The processes that train together. Tensors are of one shape and dtype on all of them, and contiguous."""

    rank: int
    size: int

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every worker's tensor, by rank, on every worker."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over workers, in place, on every worker."""
        ...

    def swap(self, row: Tensor, received: Tensor, givers: Sequence[bool]) -> None:
        """Slice k of each giver's row (size · L,) to worker k, which has them in `received` (givers, L), by rank."""
        ...

    def join(self, part: Tensor, whole: Tensor) -> None:
        """Every worker's part (L,), one after the other by rank, into `whole` (size · L,) on every worker."""
        ...

    def meet(self) -> None:
        """Wait until every worker has come here; what it has written to memory until then, this one sees."""
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

    def swap(self, row: Tensor, received: Tensor, givers: Sequence[bool]) -> None:
        """Its own row."""
        received.copy_(row.view_as(received))

    def join(self, part: Tensor, whole: Tensor) -> None:
        """Its own part."""
        whole.copy_(part)

    def meet(self) -> None:
        """It is there."""


class DistributedWorkers:
    """The default process group of torch.distributed: gloo on CPU, nccl on GPU."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._through_host = dist.get_backend() == "gloo"
        self._kept: dict[str, Tensor] = {}

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every worker's tensor, by rank."""
        sent = tensor.cpu() if self._through_host else tensor
        gathered = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(gathered, sent)
        return [part.to(tensor.device) for part in gathered]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over workers, in place."""
        here = self._reachable(tensor, "sent").copy_(tensor)
        dist.all_reduce(here)
        return tensor.copy_(here)

    def swap(self, row: Tensor, received: Tensor, givers: Sequence[bool]) -> None:
        """Slices of the givers' rows to all."""
        length = received.shape[1]
        sent = row if givers[self.rank] else row[:0]
        here, arrived = self._reachable(sent, "sent").copy_(sent), self._reachable(received, "received")
        dist.all_to_all_single(
            arrived.view(-1),
            here,
            output_split_sizes=[length * giver for giver in givers],
            input_split_sizes=[len(sent) // self.size] * self.size,
        )
        received.copy_(arrived)

    def join(self, part: Tensor, whole: Tensor) -> None:
        """Parts of all, on all."""
        here, arrived = self._reachable(part, "sent").copy_(part), self._reachable(whole, "received")
        dist.all_gather_single(arrived, here)
        whole.copy_(arrived)

    def meet(self) -> None:
        """Wait for the others."""
        dist.barrier()

    def _reachable(self, tensor: Tensor, role: str) -> Tensor:
        """The tensor itself, or kept memory of its shape where the backend reaches it.

        gloo works in host memory; it is also what workers that share one GPU use.
        """
        if not self._through_host or tensor.device.type == "cpu":
            return tensor
        key = f"{role} {tensor.dtype}"
        if key not in self._kept or len(self._kept[key]) < tensor.numel():
            self._kept[key] = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=True)
        return self._kept[key][: tensor.numel()].view(tensor.shape)


def shares(parts: int, workers: int) -> list[range]:
    """Consecutive part numbers for each worker, as equal as can be, the larger shares first."""
    least, extra = divmod(parts, workers)
    bounds = [rank * least + min(rank, extra) for rank in range(workers + 1)]
    return [range(bounds[rank], bounds[rank + 1]) for rank in range(workers)]
