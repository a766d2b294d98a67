"""Requests a second and their latency, of `mlpipes serve` and of `mlflow models serve`, with the same model in one run.

Run as `python -m mlpipes_tests.benchmarks.serving [SECONDS]`: seconds for each number of clients, 5 by default. A client
asks with one sample, waits for the answer, and asks again, over one connection. The clients share the machine with the
servers: compare the two columns, not the figures with those of another machine. CPU-ms are those of the server's processes.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from mlpipes_tests.benchmarks.figures import record
from mlpipes_tests.sandbox import CHECKOUT, end, free_port
from mlpipes_tests.serving.models import IMAGES, champion, registered, tracker_in
from mlpipes_tests.waiting import until

CLIENTS = (1, 8, 32, 128)
BODY = json.dumps({"inputs": IMAGES[:1].tolist()}).encode()


@dataclass
class Load:
    """What clients saw."""

    rate: float
    """Answers a second."""
    median: float
    """Milliseconds."""
    worst: float
    """The 99th percentile, milliseconds."""
    failed: int
    cpu: float
    """Milliseconds of CPU an answer, of all processes of the server."""


async def _client(port: int, until_then: float, seconds: list[float], failed: list[int]) -> None:
    head = f"POST /invocations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(BODY)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while time.perf_counter() < until_then:
            began = time.perf_counter()
            writer.write(head.encode() + BODY)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", answer.lower())
            assert length
            await reader.readexactly(int(length[1]))
            if answer.startswith(b"HTTP/1.1 200"):
                seconds.append(time.perf_counter() - began)
            else:
                failed.append(1)
    finally:
        writer.close()


async def _load(port: int, clients: int, duration: float) -> tuple[list[float], int]:
    seconds, failed = [], []
    then = time.perf_counter() + duration
    await asyncio.gather(*(_client(port, then, seconds, failed) for _ in range(clients)))
    return seconds, len(failed)


def _cpu(process: "subprocess.Popen[bytes]") -> float:
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return sum(each.cpu_times().user + each.cpu_times().system for each in tree)


def measured(process: "subprocess.Popen[bytes]", port: int, clients: int, duration: float) -> Load:
    """One load on one server."""
    asyncio.run(_load(port, clients, 1.0))
    before = _cpu(process)
    seconds, failed = asyncio.run(_load(port, clients, duration))
    used, times = _cpu(process) - before, np.array(seconds) * 1e3
    median, worst = (float(np.percentile(times, share)) for share in (50, 99))
    return Load(len(times) / duration, median, worst, failed, used / len(times) * 1e3)


@contextmanager
def server(home: Path, *command: str) -> "Iterator[tuple[subprocess.Popen[bytes], int]]":
    """One of the two, on a port of its own, once it answers."""
    import requests

    port = free_port()
    environment = os.environ | {
        "MLPIPES_HOME": str(home),
        "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow/mlflow.db",
        "PATH": f"{CHECKOUT}/.venv/bin:{os.environ['PATH']}",  # MLflow starts uvicorn by its name
    }
    path = home / f"{Path(command[0]).name}.log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, stdout=log, stderr=log, start_new_session=True
        )

    def answers() -> bool:
        try:
            return requests.get(f"http://127.0.0.1:{port}/ping", timeout=5).status_code == 200
        except requests.RequestException:
            return False

    try:
        until(answers, f"{command[0]} answers", vain=lambda: path.read_text() if process.poll() is not None else "")
        yield process, port
    finally:
        end(process)


def main() -> None:
    """Print the table."""
    duration = float(sys.argv[1]) if sys.argv[1:] else 5.0
    binaries = CHECKOUT / ".venv" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        tracker = tracker_in(home)
        champion(tracker, registered(tracker, 1)[0])
        ours = (f"{binaries}/mlpipes", "serve", "digits")
        theirs = (
            f"{binaries}/mlflow",
            "models",
            "serve",
            "-m",
            "models:/mlpipes-digits@champion",
            "--env-manager",
            "local",
        )
        print("clients | server | answers/s | median ms | p99 ms | failed | CPU-ms an answer")
        with server(home, *ours) as (our, our_port), server(home, *theirs) as (their, their_port):
            for clients in CLIENTS:
                for name, process, port in (("mlpipes", our, our_port), ("mlflow", their, their_port)):
                    found = measured(process, port, clients, duration)
                    record(f"{name}, {clients} clients", "answers a second", [found.rate])
                    record(f"{name}, {clients} clients, 99th percentile", "ms", [found.worst])
                    print(
                        f"{clients:7} | {name:7} | {found.rate:8.0f} | {found.median:8.1f} | {found.worst:8.1f} | "
                        f"{found.failed} | {found.cpu:.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
