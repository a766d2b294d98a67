"""The checkpoint writer: publishes checkpoints beside the training, from a copy of its state.

The training waits for the copy in the host's memory; a thread writes, checks and publishes it ("snapshot and persist":
Mohan et al. 2021, "CheckFreq", FAST). What is published, and by which rules, is the same as without the thread.
"""

import copy
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlpipes.store.messages import CheckpointSaved, MetricsLogged, Notify
from mlpipes.store.training_job import Checkpointing
from mlpipes.training.checkpoints import Checkpoints, Progress
from mlpipes.training.disk_full import write_with_patience

MayWrite = Callable[[], AbstractContextManager[None]]


class CheckpointWriter:
    """Writes the checkpoints of one training, one at a time, in a thread of its own.

    An error of the thread is raised by the next `save`, `check` or `wait`. Until `wait` has returned, the last checkpoint
    may not be there: whoever promises it to others waits first.
    """

    def __init__(self, checkpoints: Checkpoints, notify: Notify, may_write: MayWrite) -> None:
        self.checkpoints, self.notify, self.may_write = checkpoints, notify, may_write
        # Not an executor: at the interpreter's exit that would be waited for, and refuse work to a training that Ray runs in
        # another thread, which would take it for an error of its own.
        self._tasks: queue.SimpleQueue[tuple[Future[None], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closing, self._tidied = threading.Event(), False
        self._pending: Future[None] | None = None
        self._host = _HostCopy()
        self._told = 0
        self.cost_seconds: float | None = None
        """What the last published checkpoint took from the training: the copy, and the thread's time on a CPU."""
        self.write_seconds = 0.0
        """How long the last published checkpoint was written, beside the training."""

    def tell(self, progress: Progress) -> None:
        """Make the metrics of a training that a checkpoint carries visible, but for those that are."""
        new, self._told = progress.history[self._told :], len(progress.history)
        self.notify(MetricsLogged(rows=[tuple(row) for row in new]))

    def save(
        self, state: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer], progress: Progress
    ) -> None:
        """Copy a training's state and begin to publish it; waits for the one before, and for nothing else."""
        self.wait()
        begun = time.perf_counter()
        weights = self._host.of(dict(state), ("model",))
        memories = self._host.of([optimizer.state_dict() for optimizer in optimizers], ("optimizers",))
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seen = Progress.model_validate(progress.model_dump())
        copying = time.perf_counter() - begun
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name="checkpoints")
            self._thread.start()
        self._pending = Future()
        self._tasks.put((self._pending, (weights, memories, seen, copying)))

    def check(self) -> None:
        """Raises what the thread raised, if it is done."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is published.

        Raises DiskFullError, LeaseLostError, or whatever else kept the thread from it.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the thread when it has published what it was given; it does not wait for room on a full disk any more."""
        self._closing.set()
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            done, arguments = task
            try:
                self._publish(*arguments)
            except BaseException as error:  # whoever waits raises it
                done.set_exception(error)
            else:
                done.set_result(None)

    def _publish(
        self, state: dict[str, Tensor], optimizers: list[dict[str, Any]], progress: Progress, copying: float
    ) -> None:
        begun, begun_cpu = time.perf_counter(), time.thread_time()

        def publish() -> Path:
            with self.may_write():
                if not self._tidied:
                    self.checkpoints.remove_unfinished()
                    self._tidied = True
                return self.checkpoints.save(state, optimizers, progress)

        path = write_with_patience(
            publish, self.checkpoints.folder, self._host.nbytes, self.notify, ending=self._closing
        )
        self.notify(CheckpointSaved(step=progress.step, path=str(path)))
        # Metrics become visible only once a checkpoint carries them: a crash can then never leave two versions.
        self.tell(progress)
        self.write_seconds = time.perf_counter() - begun
        self.cost_seconds = copying + time.thread_time() - begun_cpu


def seconds_between(policy: Checkpointing, cost_seconds: float | None, write_seconds: float) -> float:
    """How long after a checkpoint the next one is due, in seconds; infinite if only steps and epochs decide.

    Where the mean time between failures is given, it is what Young found to lose the least (1974, "A first order
    approximation to the optimum checkpoint interval"), from the cost of the last checkpoint; the first one is due as if
    it were not given.
    """
    if policy.mean_seconds_between_failures is not None and cost_seconds is not None:
        return max(math.sqrt(2 * cost_seconds * policy.mean_seconds_between_failures), write_seconds)
    return math.inf if policy.every_seconds is None else policy.every_seconds


class _HostCopy:
    """A copy of nested containers of tensors in the host's memory, which each copy uses again.

    New memory for each would cost more than the copying. On a GPU it is pinned, so that all tensors are copied at once.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[Any, ...], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(memory.nbytes for memory in self._memory.values())

    def of(self, value: Any, where: tuple[Any, ...] = (), taken: dict[Any, torch.UntypedStorage] | None = None) -> Any:
        """The copy. Tensors keep their order in memory, for sums over them are of other bits in another, and share it with
        those with which they shared it: an optimizer may keep one counter for all, or all in one piece of memory.

        `taken`: the copies of the memory of tensors that were met before.
        """
        taken = {} if taken is None else taken
        if isinstance(value, Tensor):
            return self._tensor(value.detach(), where, taken)
        if isinstance(value, dict):
            return {key: self.of(part, (*where, key), taken) for key, part in value.items()}
        if isinstance(value, list | tuple):
            parts = [self.of(part, (*where, number), taken) for number, part in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        return copy.deepcopy(value)

    def _tensor(self, tensor: Tensor, where: tuple[Any, ...], taken: dict[Any, torch.UntypedStorage]) -> Tensor:
        if tensor.layout != torch.strided:
            return tensor.cpu().clone()
        storage = tensor.untyped_storage()
        original = (tensor.device, storage.data_ptr())
        if original not in taken:
            memory = self._memory.get(where)
            if memory is None or memory.nbytes != storage.nbytes():
                memory = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=tensor.is_cuda)
                self._memory[where] = memory
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            memory.copy_(whole, non_blocking=True)
            taken[original] = memory.untyped_storage()
        copied = torch.empty(0, dtype=tensor.dtype)
        return copied.set_(taken[original], tensor.storage_offset(), tensor.size(), tensor.stride())
