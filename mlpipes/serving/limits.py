"""Who may ask, how much, how fast, and how many at once: what stands before the application, and before its server."""

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mlpipes.serving.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
OPEN = frozenset({"/ping", "/v2/health/live", "/v2/health/ready"})
"""What is answered without a token: probes have none."""
_HEADER_SECONDS, _HEADER_BYTES, _MOST_CONNECTIONS = 5.0, 64 << 10, 1024


@dataclass(frozen=True)
class Limits:
    """What a client may ask for."""

    body_bytes: int = 8 << 20
    body_seconds: float = 10.0
    in_flight: int = 128
    token: str = ""
    """What a request must bear; empty: nothing."""


class Guard:
    """The outermost layer: counts requests, and refuses what is beyond the limits before anything is parsed."""

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        limits: Limits,
        metrics: Metrics,
        routes: frozenset[str],
        leaving: Callable[[], bool] = lambda: False,
    ) -> None:
        self.app, self.limits, self.metrics, self.routes, self.leaving = app, limits, metrics, routes, leaving
        self.in_flight = 0
        self._coming = 0
        """Bytes of bodies that are not whole yet."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, code = time.perf_counter(), 499  # nginx's code for a client that has gone

        async def noting(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                if self.leaving():  # a client that kept its connection would ask into the end of this server
                    message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
            await send(message)

        try:
            await self._limited(scope, receive, noting)
        finally:
            route = scope["path"] if scope["path"] in self.routes else "other"
            self.metrics.requests.labels(route, str(code)).inc()
            if scope["method"] == "POST":
                self.metrics.seconds.observe(time.perf_counter() - began)

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        limits, headers = self.limits, dict(scope["headers"])
        is_probe = scope["path"] in OPEN and scope["method"] in ("GET", "HEAD")
        if limits.token and not is_probe and not _bears(headers, limits.token):
            # The connection ends: what else of a body comes is not read.
            await _refuse(send, 401, "a bearer token is wanted", {"www-authenticate": "Bearer", "connection": "close"})
            return
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if _length(headers) > limits.body_bytes:
            await self._too_large(send)
            return
        # Once before the body is read, and once when it is there: what only sends slowly takes no place from those who ask.
        if self.in_flight >= limits.in_flight:
            await self._too_many(send)
            return
        body = await self._body(receive, send)
        if body is None:
            return
        if self.in_flight >= limits.in_flight:
            await self._too_many(send)
            return
        self.in_flight += 1
        self.metrics.in_flight.set(self.in_flight)
        try:
            scope["body"] = body
            await self.app(scope, receive, send)
        finally:
            self.in_flight -= 1
            self.metrics.in_flight.set(self.in_flight)

    async def _body(self, receive: Receive, send: Send) -> bytes | None:
        """The whole body; None if it was refused, or its client has gone."""
        limits, body = self.limits, bytearray()
        try:
            async with asyncio.timeout(limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    body += part
                    self._coming += len(part)
                    if len(body) > limits.body_bytes:  # of chunks, whose sum no header says
                        await self._too_large(send)
                        return None
                    if self._coming > limits.body_bytes * limits.in_flight:
                        await self._too_many(send, {"connection": "close"})
                        return None
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            await _refuse(send, 408, f"the body took more than {limits.body_seconds:g} s", {"connection": "close"})
            return None
        finally:
            self._coming -= len(body)

    async def _too_many(self, send: Send, headers: dict[str, str] | None = None) -> None:
        await _refuse(send, 429, "too many requests at once", {"retry-after": "1"} | (headers or {}))

    async def _too_large(self, send: Send) -> None:
        await _refuse(send, 413, f"a body may have {self.limits.body_bytes:,} bytes", {"connection": "close"})


def _bears(headers: dict[bytes, bytes], token: str) -> bool:
    kind, _, given = headers.get(b"authorization", b"").partition(b" ")
    return kind.lower() == b"bearer" and hmac.compare_digest(given.strip(), token.encode())


def _length(headers: dict[bytes, bytes]) -> int:
    try:
        return int(headers.get(b"content-length", b"0"))
    except ValueError:  # the server refuses it
        return 0


async def _refuse(send: Send, code: int, text: str, headers: dict[str, str]) -> None:
    body = json.dumps({"error": text}).encode()
    fields = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    pairs = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": code, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits that it has not: of the time and the bytes that headers take, and of connections.

    Between two requests, too, a connection has no more time, whatever bytes it sends.
    """

    _timer: asyncio.TimerHandle | None = None
    _head = 0
    """Bytes since the headers of the next request may have begun; -1: they are there."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        if len(self.connections) > _MOST_CONNECTIONS:
            transport.close()
            return
        self._arm()

    def data_received(self, data: bytes) -> None:
        """Some of a request has come."""
        if self._head >= 0:
            self._head += len(data)
            if self._head > _HEADER_BYTES and self._timer is not None and data.find(b"\r\n\r\n", 0, _HEADER_BYTES) < 0:
                self._late()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._arm()

    def on_headers_complete(self) -> None:
        """All headers are there."""
        self._head = -1
        self._disarm()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """The answer is sent."""
        super().on_response_complete()
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            self._arm()  # otherwise another request has been waiting for its turn

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._disarm()
        super().connection_lost(exc)

    def _arm(self) -> None:
        self._head = 0
        if self._timer is None:
            self._timer = self.loop.call_later(_HEADER_SECONDS, self._late)

    def _late(self) -> None:
        self._disarm()
        if not self.transport.is_closing():
            self.transport.close()

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
