"""400 clients of one server at once, half of them ill-behaved: the others get the right bits, and memory does not grow.

Run as `python -m mlpipes_tests.benchmarks.crowd [SECONDS]`, 60 by default. Clients ask again and again: good ones with a few
rows; the others with 50 MB (named in a header, or in chunks), headers and bodies that never end, nested brackets, or they
break off in the middle; a process with twenty of them is killed each second. It ends with 1 where a good client is not
answered, an answer has other bits, a code is not the one that it should be, or memory grows.
"""

import asyncio
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import psutil

from mlpipes_tests.benchmarks.figures import record
from mlpipes_tests.benchmarks.serving import server
from mlpipes_tests.sandbox import CHECKOUT
from mlpipes_tests.serving.models import IMAGES, champion, registered, tracker_in

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
HEAD = "POST /invocations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
BIG, PART = 50_000_000, b" " * (1 << 16)
MOST_GROWTH = 1.15
"""Of memory, from the first fifth of the time to its end; an allocator's pools fill slowly."""


async def _answer(streams: Streams) -> tuple[str, bytes]:
    """Code and body; "closed" where the server has closed the connection."""
    try:
        head = await streams[0].readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        assert length, head
        return head[9:12].decode(), await streams[0].readexactly(int(length[1]))
    except (asyncio.IncompleteReadError, ConnectionError):
        return "closed", b""


async def _good(streams: Streams, wanted: np.ndarray, seed: random.Random) -> str:
    rows = [seed.randrange(len(IMAGES)) for _ in range(seed.randint(1, 4))]
    body = json.dumps({"inputs": IMAGES[rows].tolist()})
    streams[1].write(f"{HEAD}content-length: {len(body)}\r\n\r\n{body}".encode())
    code, reply = await _answer(streams)
    if code != "200":
        return code
    return "equal" if np.array_equal(np.float32(json.loads(reply)["predictions"]), wanted[rows]) else "OTHER"


async def _sent(streams: Streams, head: str, parts: int, frame: Callable[[bytes], bytes]) -> str:
    async def send() -> None:
        with contextlib.suppress(ConnectionError):  # the server answers and closes, and need not have read it all
            for _ in range(parts):
                streams[1].write(frame(PART))
                await streams[1].drain()

    streams[1].write(f"{HEAD}{head}\r\n\r\n".encode())
    sending = asyncio.ensure_future(send())
    try:
        return (await _answer(streams))[0]
    finally:
        sending.cancel()


async def _large(streams: Streams, wanted: np.ndarray, seed: random.Random) -> str:
    return await _sent(streams, f"content-length: {BIG}", BIG // len(PART), bytes)


async def _chunks(streams: Streams, wanted: np.ndarray, seed: random.Random) -> str:
    return await _sent(
        streams, "transfer-encoding: chunked", BIG // len(PART), lambda part: b"%x\r\n%b\r\n" % (len(part), part)
    )


async def _endless_headers(streams: Streams, wanted: np.ndarray, seed: random.Random) -> str:
    streams[1].write(f"{HEAD}x-never: ".encode())
    return (await _answer(streams))[0]


async def _endless_body(streams: Streams, wanted: np.ndarray, seed: random.Random) -> str:
    streams[1].write(f"{HEAD}content-length: 5000\r\n\r\n[".encode())
    return (await _answer(streams))[0]


async def _nested(streams: Streams, wanted: np.ndarray, seed: random.Random) -> str:
    depth = seed.choice([200, 100_000])
    streams[1].write(f"{HEAD}content-length: {depth}\r\n\r\n{'[' * depth}".encode())
    return (await _answer(streams))[0]


async def _broken_off(streams: Streams, wanted: np.ndarray, seed: random.Random) -> str:
    body = json.dumps({"inputs": IMAGES[:64].tolist()})
    sent = f"{HEAD}content-length: {len(body)}\r\n\r\n{body}".encode()
    streams[1].write(sent[: seed.choice([20, len(HEAD) + 40, len(sent)])])
    await streams[1].drain()
    return "gone"


KINDS: dict[str, tuple[int, set[str], Callable[[Streams, np.ndarray, random.Random], Awaitable[str]]]] = {
    # Beyond what is answered at once there is 429, also for the good: they ask again.
    "good": (200, {"equal", "429"}, _good),
    # A server that refuses what is still being sent may be heard only as a reset.
    "50 MB": (30, {"413", "closed"}, _large),
    "50 MB in chunks": (30, {"413", "429", "closed"}, _chunks),
    "headers without end": (40, {"closed"}, _endless_headers),
    "body without end": (40, {"408", "429"}, _endless_body),
    "nested brackets": (20, {"400", "429"}, _nested),
    "broken off": (20, {"gone"}, _broken_off),
}
KILLED = 20
"""Connections of the process that is killed, beside the others."""
HELD = f"""
import socket, time
held = [socket.create_connection(("127.0.0.1", PORT)) for _ in range({KILLED})]
for each in held: each.sendall({f"{HEAD}content-length: 5000"!r}.encode() + b"\\r\\n\\r\\n[")
print("ready", flush=True); time.sleep(600)
"""


async def _client(port: int, kind: str, seed: int, then: float, wanted: np.ndarray, said: Counter[str]) -> None:
    generator, ask = random.Random(seed), KINDS[kind][2]  # noqa: S311 - no secret
    streams = None
    while time.perf_counter() < then:
        if streams is None:
            streams = await asyncio.open_connection("127.0.0.1", port)
        found = await ask(streams, wanted, generator)
        said[found] += 1
        if kind != "good" or found == "closed":
            streams[1].transport.abort()
            streams = None
        await asyncio.sleep(1.0 if found == "429" else 0.05)
    if streams is not None:
        streams[1].close()


async def _killed(port: int, then: float, said: Counter[str]) -> None:
    while time.perf_counter() < then:
        code = HELD.replace("PORT", str(port))
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
        assert process.stdout
        await process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        await process.wait()
        said["killed"] += KILLED
        await asyncio.sleep(1.0)


async def _watched(process: psutil.Process, then: float, sizes: list[int]) -> None:
    while time.perf_counter() < then:
        sizes.append(process.memory_info().rss)
        await asyncio.sleep(0.5)


async def crowd(
    port: int, process: psutil.Process, wanted: np.ndarray, seconds: float
) -> tuple[dict[str, Counter], list[int]]:
    """What each kind of client was told, and the server's resident bytes twice a second."""
    then, sizes = time.perf_counter() + seconds, list[int]()
    said = {kind: Counter[str]() for kind in (*KINDS, "killed with -9")}
    asking = [
        _client(port, kind, 1000 * place + number, then, wanted, said[kind])
        for place, (kind, (clients, _, _)) in enumerate(KINDS.items())
        for number in range(clients)
    ]
    await asyncio.gather(*asking, _killed(port, then, said["killed with -9"]), _watched(process, then, sizes))
    return said, sizes


def main() -> int:
    """Print what each kind was told."""
    seconds = float(sys.argv[1]) if sys.argv[1:] else 60.0
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        tracker = tracker_in(home)
        version, wanted = registered(tracker, 1)
        champion(tracker, version)
        with server(home, str(CHECKOUT / ".venv/bin/mlpipes"), "serve", "digits") as (process, port):
            said, sizes = asyncio.run(crowd(port, psutil.Process(process.pid), wanted, seconds))
            code, _ = asyncio.run(_once(port, wanted))
    early, late = (
        float(np.median(part)) for part in (sizes[len(sizes) // 10 : len(sizes) // 5], sizes[-len(sizes) // 10 :])
    )
    print(f"clients at once: {sum(each[0] for each in KINDS.values()) + KILLED}, for {seconds:g} s")
    for kind, counted in said.items():
        print(f"{kind:20} {KINDS[kind][0] if kind in KINDS else KILLED:4} clients {dict(counted)}")
    print(
        f"resident memory: {early / 2**20:.0f} MiB early, {late / 2**20:.0f} at the end, {max(sizes) / 2**20:.0f} at most"
    )
    print(f"afterwards: {code}")
    record("good clients in a crowd", "answers a second", [said["good"]["equal"] / seconds])
    right = all(counted and set(counted) <= KINDS[kind][1] for kind, counted in said.items() if kind in KINDS)
    return 0 if right and code == "equal" and said["good"]["equal"] and late <= MOST_GROWTH * early else 1


async def _once(port: int, wanted: np.ndarray) -> tuple[str, None]:
    streams = await asyncio.open_connection("127.0.0.1", port)
    return await _good(streams, wanted, random.Random(0)), None  # noqa: S311 - no secret


if __name__ == "__main__":
    sys.exit(main())
