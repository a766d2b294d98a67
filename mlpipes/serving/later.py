"""What is done after an answer has gone out: one thing after the other, in bounded memory; too much of it is dropped."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

_MOST_BYTES = 16 << 20
"""Of the requests that wait here."""
_MOST = 256
T = TypeVar("T")


class Later(Generic[T]):
    """Things that are still to be done. Nobody waits for them, and nobody hears of their errors."""

    def __init__(self, work: Callable[[T], Awaitable[None]], dropped: Callable[[], None]) -> None:
        self._work, self._dropped = work, dropped
        self._queue: deque[tuple[T, int]] = deque()
        self._bytes, self._wake = 0, asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def offer(self, thing: T, size: int) -> None:
        """Have it done, if there is room; `size`: bytes of the request that it is about."""
        if len(self._queue) >= _MOST or (self._bytes and self._bytes + size > _MOST_BYTES):
            self._dropped()
            return
        self._queue.append((thing, size))
        self._bytes += size
        self._wake.set()

    async def close(self) -> None:
        """Do no more."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            thing, size = self._queue[0]
            try:
                await self._work(thing)
            except Exception:  # whatever it is, answers go on
                self._dropped()
            self._queue.popleft()
            self._bytes -= size
            if not self._queue:
                self._wake.clear()
