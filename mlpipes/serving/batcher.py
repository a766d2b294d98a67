"""Batching: samples of requests that arrive together go through the model together, on one thread."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from mlpipes.serving.model import ServedModel
from mlpipes.serving.signature import cut, joined, rows_of
from mlpipes.workloads.golden import Values

AT_ONCE = 64
"""Samples that are taken from the queue for one call."""
MOST_WAITING = 1024
"""Samples in the queue beyond which requests are refused."""


class FullError(Exception):
    """The queue is full: come again."""


MODEL_THREAD = "model"
"""What the names of threads begin with that compute."""


@dataclass
class _Waiting:
    values: Values
    model: ServedModel
    future: "asyncio.Future[Values]"
    rows: int = field(init=False)

    def __post_init__(self) -> None:
        self.rows = rows_of(self.values)


class Batcher:
    """A queue in front of models. Each request is answered by the one that checked it, whichever is there by then."""

    def __init__(self, seen: Callable[[int], None] = lambda rows: None) -> None:
        self._queue: deque[_Waiting] = deque()
        self._rows, self._seen = 0, seen
        self._error: Exception = RuntimeError("nothing has failed yet")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=MODEL_THREAD)
        self._wake, self._idle = asyncio.Event(), asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def __call__(self, model: ServedModel, values: Values) -> Values:
        """The answer to samples that the model's signature has checked. Raises FullError, or what the model raises."""
        waiting = _Waiting(values, model, asyncio.get_running_loop().create_future())
        if self._rows and self._rows + waiting.rows > MOST_WAITING:
            raise FullError
        self._queue.append(waiting)
        self._rows += waiting.rows
        self._idle.clear()
        self._wake.set()
        try:
            return await waiting.future
        finally:
            self._rows -= waiting.rows
            if not self._rows:
                self._idle.set()

    async def when_idle(self) -> None:
        """Wait until nobody waits for an answer."""
        while self._rows:
            await self._idle.wait()

    async def close(self) -> None:
        """Answer no more."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            taken = self._take()
            if not self._queue:
                self._wake.clear()
            if not taken:
                continue
            self._seen(sum(each.rows for each in taken))
            # No waiting for company: while these are computed, the next gather.
            if await self._answer(taken):
                continue
            for each in taken:  # one by one, for nobody's request fails for the sample of somebody else
                if len(taken) == 1 or not await self._answer([each]):
                    self._fail(each)

    async def _answer(self, taken: list[_Waiting]) -> bool:
        """Answer requests together; whether that went well."""
        rows = sum(each.rows for each in taken)
        values = joined([each.values for each in taken])
        try:
            answer = await asyncio.get_running_loop().run_in_executor(self._thread, taken[0].model, values)
            if rows_of(answer) != rows:
                raise ValueError(f"the model gave {rows_of(answer)} answers to {rows} samples")
        except Exception as error:
            self._error = error
            return False
        at = 0
        for each in taken:
            if not each.future.done():
                each.future.set_result(cut(answer, at, at + each.rows))
            at += each.rows
        return True

    def _fail(self, waiting: _Waiting) -> None:
        if not waiting.future.done():
            waiting.future.set_exception(self._error)

    def _take(self) -> list[_Waiting]:
        """Requests from the front that may go together."""
        taken: list[_Waiting] = []
        rows = 0
        while self._queue:
            head = self._queue[0]
            if head.future.done():  # who asked has gone
                self._queue.popleft()
                continue
            together = head.model.shares and head.model.signature.same_shapes
            if taken and (not together or head.model is not taken[0].model or rows + head.rows > AT_ONCE):
                break
            taken.append(self._queue.popleft())
            rows += head.rows
        return taken
