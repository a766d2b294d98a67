"""What stands before the application: how many may ask at once, and how much may be on its way."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from mlpipes.serving import limits as module
from mlpipes.serving.limits import Guard, GuardedProtocol, Limits
from mlpipes.serving.metrics import Metrics
from mlpipes_tests.waiting import LIMIT_SECONDS

SCOPE = {"type": "http", "method": "POST", "path": "/invocations", "headers": []}


class Client:
    """One request; its body comes in the parts that a test gives it, and its answer's code is kept."""

    def __init__(self) -> None:
        self.parts: asyncio.Queue[tuple[bytes, bool]] = asyncio.Queue()
        self.code, self.headers = 0, dict[bytes, bytes]()

    def gives(self, part: bytes, *, more: bool = False) -> None:
        self.parts.put_nowait((part, more))

    async def receive(self) -> dict[str, Any]:
        part, more = await self.parts.get()
        return {"type": "http.request", "body": part, "more_body": more}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.code, self.headers = message["status"], dict(message["headers"])


def scenario(limits: Limits, play: Callable[[Guard, asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Play something before an application that answers once it is let go."""

    async def whole() -> None:
        free = asyncio.Event()

        async def application(scope: Any, receive: Any, send: Any) -> None:
            await free.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        await play(Guard(application, limits, Metrics(), frozenset({"/invocations"})), free)

    asyncio.run(asyncio.wait_for(whole(), LIMIT_SECONDS))


async def asking(guard: Guard, client: Client) -> "asyncio.Task[None]":
    task = asyncio.ensure_future(guard(dict(SCOPE), client.receive, client.send))
    for _ in range(5):  # it gets as far as it can
        await asyncio.sleep(0)
    return task


def test_more_than_may_be_answered_at_once_are_told_to_come_again() -> None:
    async def play(guard: Guard, free: asyncio.Event) -> None:
        first, slow, late = Client(), Client(), Client()
        slow.gives(b"{", more=True)
        tasks = [await asking(guard, slow)]
        first.gives(b"{}")
        tasks.append(await asking(guard, first))
        assert guard.in_flight == 1, "whose body is not there takes no place"
        late.gives(b"{}")
        await (await asking(guard, late))
        assert (late.code, late.headers[b"retry-after"]) == (429, b"1")
        slow.gives(b"}")
        await tasks[0]
        assert slow.code == 429, "and finds none when it is"
        free.set()
        await tasks[1]
        assert (first.code, guard.in_flight) == (200, 0)
        again = Client()
        again.gives(b"{}")
        await (await asking(guard, again))
        assert again.code == 200

    scenario(Limits(in_flight=1), play)


def test_bodies_that_are_on_their_way_are_bounded_all_together() -> None:
    async def play(guard: Guard, free: asyncio.Event) -> None:
        free.set()
        clients = [Client() for _ in range(3)]
        tasks = []
        for client in clients:
            client.gives(b"x" * 80, more=True)
            tasks.append(await asking(guard, client))
        assert [client.code for client in clients] == [0, 0, 429]
        assert clients[2].headers[b"connection"] == b"close", "what else it sends is not read"
        for client in clients[:2]:
            client.gives(b"")
        await asyncio.gather(*tasks)
        assert [client.code for client in clients[:2]] == [200, 200]
        another = Client()
        another.gives(b"x" * 80)
        await (await asking(guard, another))
        assert another.code == 200, "they count no more"

    scenario(Limits(in_flight=2, body_bytes=100), play)


def test_connections_beyond_the_limit_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn
    from uvicorn.server import ServerState

    monkeypatch.setattr(module, "_MOST_CONNECTIONS", 1)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("nobody asks")

    async def whole() -> list[bytes]:
        config = uvicorn.Config(application, log_config=None)
        config.load()
        loop, state = asyncio.get_running_loop(), ServerState()
        server = await loop.create_server(lambda: GuardedProtocol(config, state, {}), "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            refused = await asyncio.wait_for(streams[1][0].read(), module._HEADER_SECONDS * 100)
            kept = not streams[0][0].at_eof()
            for _, writer in streams:
                writer.close()
        return [refused, b"kept" if kept else b"closed"]

    monkeypatch.setattr(module, "_HEADER_SECONDS", 600.0)
    assert asyncio.run(whole()) == [b"", b"kept"]
