"""The process that serves: uvicorn on one address, ended in peace by SIGTERM, with TLS where it leaves the machine."""

import asyncio
import os
import socket
import ssl
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from mlpipes.errors import ConfigError
from mlpipes.serving.batcher import MODEL_THREAD
from mlpipes.serving.limits import GuardedProtocol
from mlpipes.serving.web import State, make_app
from mlpipes.store.environment import LOOPBACK

_WAITING = 2048
"""Connections that the kernel holds until they are accepted."""
_GRACE = 20
"""Seconds that requests in flight have when it is told to end."""


@dataclass(frozen=True)
class Address:
    """Where a server listens; port 0: any that is free."""

    host: str = "127.0.0.1"
    port: int = 8100
    certificate: Path | None = None
    key: Path | None = None
    behind_proxy: bool = False
    """Whether something in front of it speaks TLS."""
    drain: float = 0.0
    """Seconds between SIGTERM and the end in which it is not ready, and still answers."""

    anybody: bool = False
    """Whether whoever reaches it may ask, without a token: something in front of it lets only those through that may."""

    def check(self, token: str) -> None:
        """Raises ConfigError for what would let anybody ask, or listen in, or cannot work."""
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("TLS needs both: --tls-cert and --tls-key")
        for path in (self.certificate, self.key):
            if path is not None and not path.is_file():
                raise ConfigError(f"{path} is not there; name a file in PEM")
        if self.certificate is not None and self.key is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key, password="")
            except (ssl.SSLError, OSError) as error:
                raise ConfigError(
                    f"{self.certificate} and {self.key} are no certificate and its key in PEM, without a password: {error}"
                ) from error
        if token and self.anybody:
            raise ConfigError("--no-token and MLPIPES_SERVE_TOKEN contradict each other: unset one of them")
        if self.host in LOOPBACK:
            return
        if not token and not self.anybody:
            raise ConfigError(
                f"whoever reaches {self.host} could ask: set MLPIPES_SERVE_TOKEN, which requests then bear, or say "
                "--no-token where something in front of it asks who asks"
            )
        if self.certificate is None and not self.behind_proxy:
            raise ConfigError(
                f"on {self.host}, the token and all data would travel in the open: name --tls-cert and --tls-key, or say "
                "--behind-proxy where something in front of it speaks TLS"
            )


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, state: State, drain: float) -> None:
        super().__init__(config)
        self.state, self.drain = state, drain
        self.loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not ready any more, and after a while no more; a second signal ends it at once.

        uvicorn's own would raise the signal again at the end, and the process would seem to have been killed.
        """
        if not self.started or self.should_exit:
            # Nothing that is loading or computing can be interrupted; what is written is safe at any moment.
            os._exit(0 if not self.started else 1)
        if self.state.draining or not self.drain or self.loop is None:
            self.should_exit = True
            return
        self.state.draining = True
        # From a signal's handler, which may run anywhere.
        self.loop.call_soon_threadsafe(self.loop.call_later, self.drain, self._end)

    def _end(self) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[Any] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)


def serve(state: State, address: Address) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError where nothing can be served, or the port is taken."""
    address.check(state.limits.token)
    problem: list[BaseException] = []
    options: dict[str, Any] = {}
    if address.certificate is not None:
        options = {"ssl_certfile": str(address.certificate), "ssl_keyfile": str(address.key)}
    config = uvicorn.Config(
        _Noting(make_app(state), problem),
        host=address.host,
        port=address.port,
        http=GuardedProtocol,
        loop="uvloop",
        ws="none",
        lifespan="on",
        access_log=False,
        log_level="critical",
        server_header=False,
        proxy_headers=False,  # behind a proxy, clients are told apart by a header of our own
        timeout_graceful_shutdown=_GRACE,
        **options,
    )
    server = _Server(config, state, address.drain)
    sock = _bound(address)
    scheme = "https" if address.certificate is not None else "http"
    host = f"[{address.host}]" if ":" in address.host else address.host
    where = f"{scheme}://{host}:{sock.getsockname()[1]}"
    state.tell(f"{state.registry.wanted} will answer on {where} (try {where}/docs) when it is loaded; Ctrl-C ends it")
    try:
        server.run([sock])
    except SystemExit:
        if not problem:
            raise
    finally:
        sock.close()
    if problem:
        raise problem[0]
    _leave_behind_what_computes()


def _leave_behind_what_computes() -> None:
    """End now, if a model still computes: nothing can stop it, and Python would wait for it."""
    for thread in threading.enumerate():
        if thread.name.startswith(MODEL_THREAD):
            thread.join(1)
            if thread.is_alive():
                sys.stdout.flush()
                os._exit(0)


def _bound(address: Address) -> Any:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((address.host, address.port))
        sock.listen(_WAITING)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"{address.host}:{address.port} cannot be listened on ({error.strerror}); try --port"
        ) from None
    return sock


class _Noting:
    """Passes on, and keeps what the application's start has raised, which uvicorn would only log."""

    def __init__(self, app: Any, problem: list[BaseException]) -> None:
        self.app, self.problem = app, problem

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self.app(scope, receive, send)
        except Exception as error:
            if scope["type"] == "lifespan":
                self.problem.append(error)
            raise
