"""What is done after an answer has gone out: one thing after the other, in bounded memory; too much of it is dropped."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable

from mlpipes.serving.traffic import Answered

_MOST_BYTES = 16 << 20
"""Of the bodies of requests that wait here."""
_MOST_REQUESTS = 256


class Later:
    """Answered requests that something is still to be done with. Nobody waits for it, and nobody hears of its errors."""

    def __init__(self, work: Callable[[Answered], Awaitable[None]], dropped: Callable[[], None]) -> None:
        self._work, self._dropped = work, dropped
        self._queue: deque[Answered] = deque()
        self._bytes, self._wake = 0, asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def offer(self, answered: Answered) -> None:
        """Have it done with a request, if there is room."""
        full = len(self._queue) >= _MOST_REQUESTS or (self._bytes and self._bytes + answered.size > _MOST_BYTES)
        if full:
            self._dropped()
            return
        self._queue.append(answered)
        self._bytes += answered.size
        self._wake.set()

    async def close(self) -> None:
        """Do no more."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            answered = self._queue[0]
            try:
                await self._work(answered)
            except Exception:  # of somebody's model or disk
                self._dropped()
            self._queue.popleft()
            self._bytes -= answered.size
            if not self._queue:
                self._wake.clear()
