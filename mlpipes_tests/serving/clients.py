"""Clients of a served model that ask all the time, retry what a broken connection took with it, and count."""

import socket
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import requests
import urllib3.exceptions
from requests.adapters import HTTPAdapter

from mlpipes_tests.serving.models import IMAGES
from mlpipes_tests.waiting import until

_PAUSE = 0.05
"""Between two requests of a client: the machine's few cores are for those who answer, too."""
_BROKEN = (requests.ConnectionError, requests.exceptions.ChunkedEncodingError, requests.ReadTimeout)
"""No limit is set to reading: its time-out is the kernel's word that the peer has vanished."""
_CONNECT_SECONDS = 10
"""The kernel of a listener connects, however busy the machine is."""
# A peer that has vanished is noticed by its silence to the kernel, so that no answer can come too late.
_WATCHED = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 20_000),
]


class _Watching(HTTPAdapter):
    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options, socket_options=_WATCHED)


@dataclass
class Counts:
    """What clients have seen."""

    answers: Counter[str] = field(default_factory=Counter)
    """By version."""
    lost: list[str] = field(default_factory=list)
    """Requests that were sent and whose connection then broke."""
    unreached: list[str] = field(default_factory=list)
    """Connections that did not come to be: nothing was asked."""


class Clients:
    """So many of them; every second one makes a new connection for each request.

    What is neither the evaluation's answer nor a broken connection is a failure, and is asked no more.
    """

    def __init__(
        self, address: str, headers: Mapping[str, str], versions: Mapping[str, np.ndarray], number: int = 6
    ) -> None:
        self.address, self.headers, self.versions, self.number = address, headers, versions, number
        self.failures: list[str] = []
        self._counts, self._answered = Counts(), [0] * number
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(each,)) for each in range(number)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def failed(self) -> str:
        """The first failures; empty if there are none."""
        return "; ".join(self.failures[:3])

    def counted(self) -> Counts:
        """What was seen since this was called last, once each client has had another answer."""
        before = list(self._answered)
        until(
            lambda: all(now > then for now, then in zip(self._answered, before, strict=True)),
            "each client is answered",
            vain=self.failed,
        )
        with self._lock:
            counts, self._counts = self._counts, Counts()
        return counts

    def _run(self, client: int) -> None:
        generator, keeps = np.random.default_rng(client), client % 2 == 0
        try:
            with requests.Session() as session:
                session.mount("http://", _Watching())
                while not self._ended.wait(_PAUSE):
                    rows = generator.choice(len(IMAGES), generator.integers(1, 12))
                    while not self._asked(session, rows, client) and not self._ended.wait(_PAUSE):
                        pass
                    if not keeps:
                        session.close()
        except Exception as error:
            self.failures.append(repr(error))

    def _asked(self, session: requests.Session, rows: np.ndarray, client: int) -> bool:
        """Ask once; False where the connection broke."""
        try:
            answer = session.post(
                f"{self.address}/invocations",
                json={"inputs": IMAGES[rows].tolist()},
                headers=self.headers,
                timeout=(_CONNECT_SECONDS, None),
            )
        except _BROKEN as error:
            with self._lock:
                (self._counts.unreached if _was_never_made(error) else self._counts.lost).append(repr(error))
            return False
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text}"
        version = answer.headers["x-model-version"]
        found = np.array(answer.json()["predictions"], dtype=np.float32)
        assert np.array_equal(found, self.versions[version][rows]), f"version {version} answers otherwise"
        with self._lock:
            self._counts.answers[version] += 1
            self._answered[client] += 1
        return True


def _was_never_made(error: requests.RequestException) -> bool:
    why = getattr(error.args[0] if error.args else None, "reason", None)
    # A time-out of connecting, or what the kernel says to it.
    return isinstance(why, urllib3.exceptions.ConnectTimeoutError | urllib3.exceptions.NewConnectionError)
