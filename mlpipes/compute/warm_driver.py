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
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from mlpipes.compute.warm_process import Request, environment_of_all, run_here

FOLDER_VARIABLE = "MLPIPES_RAY_FOLDER"
"""Environment variable that has the folder of the private Ray, which nobody else may look into; not set anywhere else."""
_PATIENCE_SECONDS = 30.0
"""What there is for a warm process to import and to answer: Ray ends a worker that has not come after 60 s."""
_POLL_SECONDS = 0.05
_AHEAD, _AHEAD_SECONDS = "--ahead", 20.0
_OF_PYTHON = ("-s", "-S")
"""Options that Ray repeats before a worker where its own Python was given them, or has them from the environment."""
_ABOUT = (
    "drivers and workers of a private Ray are forked from this process, and write their own command lines in this place"
)


def start_ahead(environment: Mapping[str, str], threads: int = 1) -> None:
    """Start the warm process of a private Ray, for drivers with this environment and so many threads.

    It imports while Ray starts, and the first job need not wait for it. A driver with another environment or more threads
    starts its own, as it does where this one does not come up.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(
            [sys.executable, "-m", __name__, _AHEAD],
            env=dict(environment) | {"OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            timeout=_AHEAD_SECONDS,
            check=False,
        )


def main(arguments: Sequence[str]) -> int:
    """Have a module run to its end in a fork of the warm process; returns its exit code."""
    if list(arguments) == [_AHEAD]:
        return _ahead()
    while arguments and arguments[0] in _OF_PYTHON:
        arguments = arguments[1:]
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # a closed stream, whose number something else would get
        pass
    os.close(descriptor)
    request = Request.of_this_process(arguments)
    if (folder := os.environ.get(FOLDER_VARIABLE)) and sys.platform == "linux":
        try:
            os.close(os.pidfd_open(os.getpid()))  # not every sandbox allows it
            connection, pid = _forked(Path(folder), request)
        except OSError as error:
            with suppress(OSError):
                print(f"This process starts without a warm one: {error}", flush=True)
        else:
            return _follow(connection, pid)
    return run_here(request)


def _ahead() -> int:
    os.close(os.pidfd_open(os.getpid()))  # as in `main`: without it, nobody would ask
    folder, request = Path(os.environ[FOLDER_VARIABLE]), Request.of_this_process([])
    path, deadline = folder / f"warm-{request.key}", time.monotonic() + _PATIENCE_SECONDS
    with _one_at_a_time(path.with_suffix(".lock"), deadline):
        if (connection := _connected(place := path.with_suffix(".socket")) or _started(place, request)) is not None:
            connection.close()
    return 0


def _forked(folder: Path, request: Request) -> tuple[socket.socket, int]:
    """A connection to the warm process, and the driver that it has forked. Raises OSError if there is none to be had."""
    path, deadline = folder / f"warm-{request.key}", time.monotonic() + _PATIENCE_SECONDS
    with _one_at_a_time(path.with_suffix(".lock"), deadline):
        for connect in (_connected, lambda path: _started(path, request)):
            connection = connect(path.with_suffix(".socket"))
            if connection is None:
                continue
            with ExitStack() as stack:
                stack.callback(connection.close)
                connection.settimeout(max(0.1, deadline - time.monotonic()))
                try:
                    pid = _asked(connection, request)
                except ConnectionError:  # it was just ending
                    continue
                except TimeoutError:
                    path.with_suffix(".socket").unlink(missing_ok=True)  # it may hang: the next one starts another
                    raise
                connection.settimeout(None)
                stack.pop_all()
                return connection, pid
    raise ConnectionError(f"it has ended; its log is {path.with_suffix('.log')}")


@contextmanager
def _one_at_a_time(path: Path, deadline: float) -> Iterator[None]:
    """Raises TimeoutError where somebody else does not come to an end."""
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise TimeoutError("somebody else is asking for it") from error
                time.sleep(_POLL_SECONDS)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)


def _connected(path: Path) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(1.0)
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
        if (between := os.fork()) == 0:  # so that it is no child of a job's, with which Ray would end it
            try:
                subprocess.Popen(
                    [sys.executable, "-m", "mlpipes.compute.warm_process", str(listener.fileno()), str(path), _ABOUT],
                    env=environment_of_all(request.environment),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[listener.fileno()],
                    start_new_session=True,
                )
            finally:
                os._exit(0)
        os.waitpid(between, 0)
        return _connected(path)


def _asked(connection: socket.socket, request: Request) -> int:
    """The driver that was forked. Raises TimeoutError if the warm process says nothing for long."""
    said = json.dumps(asdict(request)).encode()
    socket.send_fds(connection, [len(said).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(said)
    return _answer(connection)["pid"]


def _answer(connection: socket.socket) -> dict[str, int]:
    """The next that the warm process says. Raises ConnectionError if it has ended."""
    said = b""
    while not said.endswith(b"\n"):
        if not (more := connection.recv(1)):
            raise ConnectionError("it has ended")
        said += more
    return json.loads(said)


def _follow(connection: socket.socket, pid: int) -> int:
    """Stand in for a driver until it ends; returns its exit code, or ends by the signal by which it has.

    Should this process end first, the warm process kills the driver.
    """
    with suppress(ProcessLookupError):  # it has ended already
        driver = os.pidfd_open(pid)
        for asked in (signal.SIGTERM, signal.SIGINT):
            signal.signal(asked, lambda number, _: _send(driver, number))
    try:
        code = _answer(connection)["code"]
    except ConnectionError:  # and the driver with it
        return 1
    if code < 0:
        with suppress(OSError, ValueError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _send(driver: int, number: int) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(driver, number)


def run_driver(main: Callable[[], int]) -> NoReturn:
    """Do a driver's work, and end it with the exit code that is returned, or with 1 and the traceback of what was raised.

    Taking down module by module what it has imported would take a second and a half, for which whoever is to start the
    next attempt would wait.
    """
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    with suppress(Exception):  # the work is done, or is to be done again
        if (ray := sys.modules.get("ray")) is not None:
            ray.shutdown()
        logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
