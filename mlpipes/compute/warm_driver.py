"""How drivers begin and end: beside a private Ray they are forked from a process that has imported what all of them need.

Run as `python -m mlpipes.compute.warm_driver <module> <argument>…`, this is to whoever looks on as if the module ran in it:
same output, same signals, same end. Where there cannot be a warm process, it does run in it. Ray starts its workers so, too,
with its own program in the place of a module.
"""

import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from mlpipes.compute.warm_process import Request, environment_of_all, run_here

FOLDER_VARIABLE = "MLPIPES_RAY_FOLDER"
"""Environment variable that has the folder of the private Ray, which nobody else may look into; not set anywhere else."""
_ANSWER_SECONDS = 120.0
"""What a warm process gets to import and to answer, on a machine that is very busy."""


def main(arguments: Sequence[str]) -> int:
    """Have a module run to its end in a fork of the warm process; returns its exit code."""
    request, folder = Request.of_this_process(arguments), os.environ.get(FOLDER_VARIABLE)
    if folder and hasattr(os, "pidfd_open"):  # Linux
        try:
            connection, pid = _forked(Path(folder), request)
        except OSError as error:
            print(f"This driver starts without a warm process: {error}", flush=True)
        else:
            return _follow(connection, pid)
    return run_here(request)


def _forked(folder: Path, request: Request) -> tuple[socket.socket, int]:
    """A connection to the warm process, and the driver that it has forked. Raises OSError if there is none to be had."""
    path = folder / "warm.socket"
    with _one_at_a_time(folder / "warm.lock"):
        for connect in (lambda: _connected(path), lambda: _started(path, request)):
            connection = connect()
            if connection is None:
                continue
            with ExitStack() as stack:
                stack.callback(connection.close)
                # One that has just ended, or is another environment's, forks no more: the next one is a new one.
                if pid := _asked(connection, request):
                    stack.pop_all()
                    return connection, pid
    raise ConnectionError("it does not fork; its log is beside Ray's")


def _asked(connection: socket.socket, request: Request) -> int:
    """The driver that was forked; 0 if the warm process forks no more. Raises TimeoutError if it says nothing for long."""
    connection.settimeout(_ANSWER_SECONDS)
    said = json.dumps(asdict(request) | {"key": request.key}).encode()
    try:
        socket.send_fds(connection, [len(said).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(said)
        pid = _answer(connection)["pid"]
    except ConnectionError:
        return 0
    connection.settimeout(None)
    return pid


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _connected(path: Path) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    return connection


def _started(path: Path, request: Request) -> socket.socket | None:
    """A connection to a new warm process, which outlives this one. It can be connected to before it has imported."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener, path.with_suffix(".log").open("wb") as log:
        listener.bind(str(path))
        listener.listen()
        subprocess.Popen(
            [sys.executable, "-m", "mlpipes.compute.warm_process", str(listener.fileno()), request.key],
            env=environment_of_all(request.environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
        return _connected(path)


def _answer(connection: socket.socket) -> dict[str, Any]:
    """What the warm process says. Raises ConnectionError if it has ended, TimeoutError if it says nothing for long."""
    said = b""
    while not said.endswith(b"\n"):
        if not (more := connection.recv(4096)):
            raise ConnectionError("it has ended")
        said += more
    return json.loads(said)


def _follow(connection: socket.socket, pid: int) -> int:
    """Stand in for a driver until it ends; returns its exit code, or ends by the signal by which it has.

    Should this process end first, the warm process kills the driver.
    """
    for asked in (signal.SIGTERM, signal.SIGINT):
        signal.signal(asked, lambda number, _: _send(pid, number))
    try:
        code = _answer(connection)["code"]
    except ConnectionError:  # and the driver with it
        return 1
    if code < 0:
        with suppress(OSError, ValueError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def end_driver(code: int) -> NoReturn:
    """End a driver whose work is done: taking down module by module what it has imported would take a second and a half."""
    if (ray := sys.modules.get("ray")) is not None:
        ray.shutdown()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
