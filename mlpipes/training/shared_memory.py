"""Sums over the shards of workers on one machine, in memory that they share.

Through gloo, what workers of one machine add up goes into the kernel and out of it again, and twice in a fixed order: for
MiniLM and four workers a sixth of a step's CPU-seconds, or more. Here each worker writes its sums where the others read
them, adds up one slice of all of them, and copies what the others have added up. Additions and their order are those of
`TreeReduction`, and so are the bits.

The memory is anonymous (memfd_create(2)): it has no name that could be left behind, it goes with the processes, it counts
as theirs, and not towards /dev/shm, which is small in a container. Only processes of the same user can open it.
"""

import os
import secrets
import sys
import weakref
from pathlib import Path

import torch
from torch import Tensor

from mlpipes.training.parallel import Workers
from mlpipes.training.reduction import TreeReduction

_GROWTH = 1.25
"""How much more is mapped than is needed, because a step reads a few rows more of a table than the one before."""


class SharedMemoryReduction(TreeReduction):
    """Adds up the roots of all workers' subtrees in memory of one machine, which every worker can read and write.

    All workers construct it, and call each method, at the same time. Raises OSError, on all of them, where one of them
    cannot open the memory of another: they are on several machines or in several containers, or this is not Linux.
    """

    def __init__(self, workers: Workers, leaves: int) -> None:
        super().__init__(workers, leaves, torch.device("cpu"))
        self._most = max(map(len, self.spans))
        self._size = 0
        self._mapped: list[Tensor] = []
        token = secrets.randbits(62)
        self._file = _created(_name(token))
        if self._file >= 0:
            weakref.finalize(self, os.close, self._file)
        mine = torch.tensor([os.getpid(), self._file, token])
        self._files = [_path(int(pid), int(file), int(name)) for pid, file, name in workers.gather(mine)]
        reached = torch.tensor(all(path is not None for path in self._files))
        if not all(map(bool, workers.gather(reached))):
            raise OSError("the workers do not share the memory of one machine")

    def rows(self, count: int, size: int) -> Tensor:
        """Memory to write `count` roots of `size` numbers to: float32 (count, `size` or some more), of any content."""
        padded = self.padded(size)
        if padded > self._size:
            self._map(self.padded(int(padded * _GROWTH)))
        return self._mapped[self.workers.rank][: count * padded].view(count, padded)

    def sum(self, rows: Tensor) -> Tensor:
        """The sum over all leaves, on every worker, in memory of its own, given this worker's roots in `rows`."""
        padded = rows.shape[1]
        length = padded // self.workers.size
        mine = slice(self.workers.rank * length, (self.workers.rank + 1) * length)
        self.workers.meet()  # all have written their roots
        roots = {
            span: memory[number * padded : (number + 1) * padded][mine]
            for memory, spans in zip(self._mapped, self.spans, strict=True)
            for number, span in enumerate(spans)
        }
        # A place of its own: when the next step's roots are written, others may still copy from here.
        sums = [memory[self._most * self._size :][:length] for memory in self._mapped]
        sums[self.workers.rank].copy_(self.added_up(roots))
        self.workers.meet()  # all have added up their slices, and nobody reads a root any more
        return torch.cat(sums, out=self.memory("whole", padded))

    def _map(self, size: int) -> None:
        """Make room for rows of `size` numbers on every worker."""
        room = self._most * size + size // self.workers.size
        os.ftruncate(self._file, room * torch.float32.itemsize)
        self.workers.meet()
        self._mapped = [
            torch.from_file(path, shared=True, size=room, dtype=torch.float32) for path in self._files if path
        ]
        self._size = size


def _name(token: int) -> str:
    return f"mlpipes-{token:016x}"


def _created(name: str) -> int:
    """A file in memory, empty; -1 where the system makes none."""
    if sys.platform != "linux":
        return -1
    try:
        return os.memfd_create(name)
    except OSError:
        return -1  # forbidden to this process


def _path(pid: int, file: int, token: int) -> str | None:
    """Where this process finds another's file; None if it cannot open it.

    What is there under these numbers may be somebody else's, if the other one counts its processes by itself.
    """
    path = f"/proc/{pid}/fd/{file}"
    try:
        if str(Path(path).readlink()) != f"/memfd:{_name(token)} (deleted)":
            return None
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return None
    return path
