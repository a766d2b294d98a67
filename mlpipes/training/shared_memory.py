"""Sums over the shards of workers on one machine, in memory that they share.

Through gloo, what workers of one machine add up goes into the kernel and out of it again, and twice in a fixed order: for
MiniLM and four workers a sixth of a step's CPU-seconds, or more. Here each worker writes its sums where the others read
them, adds up one slice of all of them, and copies what the others have added up. Additions and their order are those of
`TreeReduction`, and so are the bits.

The memory is anonymous (memfd_create(2)): it has no name that could be left behind, it goes with the processes, it counts
as theirs, and not towards /dev/shm, which is small in a container. Only processes of the same user can open it, and root's.
"""

import os
import secrets
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from mlpipes.training.parallel import Workers
from mlpipes.training.reduction import TreeReduction

T = TypeVar("T")

_GROWTH = 1.25
"""How much more is mapped than is needed, because a step reads a few rows more of a table than the one before."""


class SharedMemoryReduction(TreeReduction):
    """Adds up the roots of all workers' subtrees in memory of one machine, which every worker can read and write.

    All workers construct it, and call each method, at the same time. The constructor and `rows` raise OSError, on all of
    them, where one of them cannot make memory or open that of another: they are on several machines or in several
    containers, this is not Linux, or a limit is reached.
    """

    def __init__(self, workers: Workers, leaves: int) -> None:
        super().__init__(workers, leaves, torch.device("cpu"))
        self._most = max(map(len, self.spans))
        self._size = 0
        self._mapped: list[Tensor] = []
        files = ExitStack()
        weakref.finalize(self, files.close)
        token = secrets.randbits(62)
        mine = torch.tensor([os.getpid(), _created(_name(token), files), token])
        others = [(int(pid), int(file), int(name)) for pid, file, name in workers.gather(mine)]
        # Kept open: who is killed later takes no memory from the others, who then learn from gloo that it is gone.
        self._files = self._everywhere(lambda: [_opened(*other, files) for other in others])

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
        mine = self._files[self.workers.rank]
        self._everywhere(lambda: os.ftruncate(mine, room * torch.float32.itemsize))
        self._mapped = self._everywhere(
            lambda: [
                torch.from_file(f"/proc/self/fd/{file}", shared=True, size=room, dtype=torch.float32)
                for file in self._files
            ]
        )
        self._size = size

    def _everywhere(self, action: Callable[[], T]) -> T:
        """What an action gives on this worker; raises OSError on all of them if it fails on one."""
        found, failed = [], False
        try:
            found.append(action())
        except (OSError, RuntimeError):  # of the system, and of torch on the system's behalf
            failed = True
        if any(map(bool, self.workers.gather(torch.tensor(failed)))):
            raise OSError("the workers do not share the memory of one machine")
        return found[0]


def _name(token: int) -> str:
    return f"mlpipes-{token:016x}"


def _created(name: str, files: ExitStack) -> int:
    """A file in memory, empty, that `files` closes; -1 where there are none."""
    # Not every Python has the call: it depends on the C library with which it was built.
    create = getattr(os, "memfd_create", None)
    if create is None:
        return -1
    try:
        file = create(name)
    except OSError:
        return -1  # forbidden to this process
    files.callback(os.close, file)
    return file


def _opened(pid: int, file: int, token: int, files: ExitStack) -> int:
    """Another worker's memory as a file of this process, that `files` closes. Raises OSError if there is none.

    What is there under these numbers may be somebody else's, if the other one counts its processes by itself.
    """
    path = Path(f"/proc/{pid}/fd/{file}")
    if str(path.readlink()) != f"/memfd:{_name(token)} (deleted)":
        raise OSError(f"{path} is another file")
    opened = os.open(path, os.O_RDWR)
    files.callback(os.close, opened)
    return opened
