"""The warm process, from which drivers and workers are forked: it has imported what they need of others.

While nobody asks it for long enough, it imports of what they were seen to import (`imported`), too.

Run as `python -m mlpipes.compute.warm_process <socket> …` by the first that asks for it beside a private Ray. It ends when
it was idle for long, or with that Ray.
"""

import ctypes
import gc
import hashlib
import importlib
import json
import os
import re
import runpy
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

IDLE_SECONDS = 300.0
"""After so long without a driver it ends: it holds half a gigabyte."""
PRELOADED = (
    *("numpy", "torch", "torch._dynamo", "mlflow"),
    *("pyarrow.fs", "pandas", "fsspec", "jsonschema", "msgpack", "filelock"),  # what most of Ray's imports take
)
"""What drivers and workers import of others. Not our own code, nor a user's: each process reads that anew. Nor Ray, which
takes in at its import to which job a worker belongs. Nor what only a dry run takes: the first job of a Ray waits for all of
this, and matplotlib makes a folder at its import where it has no place for its cache, which each fork would remove."""
_FINGERPRINT = "MLPIPES_FINGERPRINT"
_OF_ONE_JOB = re.compile(rf"{_FINGERPRINT}|CUDA_VISIBLE_DEVICES|RAY_\w+|SPT_NOENV|PYTHONBREAKPOINT|(OLD)?PWD|SHLVL|_")
"""Variables that nothing reads when it is imported. Any other may have been read, and is the same in all drivers."""
_FINGERPRINT_BYTES = 128
_REQUEST_SECONDS, _LOOK_SECONDS = 10.0, 5.0
_SET_DEATH_SIGNAL = 1
"""`PR_SET_PDEATHSIG` of prctl(2): a process gets a signal when the one that forked it ends."""


@dataclass(frozen=True)
class Request:
    """A driver that is to be forked."""

    arguments: list[str]
    """A module, or a file of Python code, and the arguments that it gets."""
    environment: dict[str, str]
    folder: str
    path: list[str]
    """Where Python looks for modules."""
    blocked: list[int] = field(default_factory=list)
    """Signals that are held back."""
    umask: int = 0o022

    @classmethod
    def of_this_process(cls, arguments: Sequence[str]) -> "Request":
        """A driver as it would be in this process."""
        os.umask(umask := os.umask(0))
        blocked = [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])]
        return cls(list(arguments), dict(os.environ), os.path.realpath("."), list(sys.path), blocked, umask)

    @property
    def key(self) -> str:
        """Digest of all that a process has taken in when it has imported: its environment, and what is installed."""
        # Whatever is installed or removed changes the folder.
        places = [__file__, *(place for place in self.path if place.endswith("-packages"))]
        seen = [(place, Path(place).stat().st_mtime_ns) for place in places if Path(place).exists()]
        # Nothing of others reads which home it is; a replay has one of its own.
        variables = [pair for pair in sorted(_of_all(self.environment).items()) if pair[0] != "MLPIPES_HOME"]
        told = json.dumps([variables, sys.executable, seen])
        return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()


def environment_of_all(environment: Mapping[str, str]) -> dict[str, str]:
    """The warm process's environment: a driver's, with room for its fingerprint.

    The room comes last: psutil takes the end of a shorter fingerprint for the end of the environment.
    """
    return _of_all(environment) | {_FINGERPRINT: "-" * _FINGERPRINT_BYTES}


def _of_all(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not _OF_ONE_JOB.fullmatch(name)}


class WarmProcess:
    """Forks a driver for everyone who asks, and tells how it has ended."""

    def __init__(self, listener: socket.socket, noted: Callable[[], Sequence[str]] = tuple) -> None:
        """With `noted`, it asks now and then for more modules to import ahead."""
        self._listener, self._noted, self._selector = listener, noted, selectors.DefaultSelector()
        self._drivers: dict[int, tuple[socket.socket, int]] = {}
        """By process number: whose stand-in is at the other end, and the descriptor that tells of the driver's end."""
        self._ahead, self._tried = list[str](), set[str]()
        """Modules that drivers were seen to import, and that are to be imported here, and those that were."""
        self._pid, self._libc = os.getpid(), ctypes.CDLL(None)
        self._libc.getenv.restype = ctypes.c_void_p
        self._fingerprint: int | None = self._libc.getenv(_FINGERPRINT.encode())

    def serve(self) -> Request | None:
        """Fork until nobody has asked for long; returns, in a driver, what it is to do."""
        self._selector.register(self._listener, selectors.EVENT_READ)
        wait, asked = 0.0, time.monotonic()
        while self._drivers or time.monotonic() - asked < IDLE_SECONDS:
            if not (events := self._selector.select(wait)):
                wait = 0.0 if self._import_one() else min(_LOOK_SECONDS, IDLE_SECONDS)
                continue
            asked = time.monotonic()
            for key, _ in events:
                if key.data is not None:
                    self._look_at(key.data, key.fd)
                elif (request := self._take()) is not None:
                    return request
        return None

    def _import_one(self) -> bool:
        """Import one more of what drivers were seen to import, while nobody asks; returns whether there was any."""
        self._ahead = self._ahead or [name for name in self._noted() if name not in self._tried]
        if not self._ahead:
            return False
        self._tried.add(name := self._ahead.pop(0))
        try:
            importlib.import_module(name)
        except (Exception, SystemExit):  # another version may have no such module; its drivers are not to end for it
            traceback.print_exc()
        gc.freeze()
        return True

    def _take(self) -> Request | None:
        """Answer one who asks; returns, in the driver that was forked for him, what it is to do."""
        connection, files, pid = None, list[int](), 0
        try:
            connection, _ = self._listener.accept()
            request = _read(connection, files)
            if (pid := os.fork()) == 0:
                try:
                    self._become(request, files, connection)
                    return request
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)  # it is not to go on as another warm process
            with suppress(OSError):
                os.setpgid(pid, pid)  # whichever of both is first
            end = os.pidfd_open(pid)
            self._drivers[pid] = connection, end
            self._selector.register(end, selectors.EVENT_READ, pid)
            self._selector.register(connection, selectors.EVENT_READ, pid)
            _tell(connection, pid=pid)
        except Exception:  # who asked has gone, or there is no room for another; those who are there go on
            traceback.print_exc()
            if pid and pid not in self._drivers:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            if connection is not None and pid not in self._drivers:
                connection.close()
        finally:
            for file in files:
                os.close(file)
        return None

    def _look_at(self, pid: int, descriptor: int) -> None:
        """A driver has ended, or who stands in for it has: then it is to end, too, with what it has started."""
        if pid not in self._drivers:
            return
        connection, end = self._drivers[pid]
        if descriptor != end:
            self._selector.unregister(connection)
            for kill in (os.killpg, os.kill):  # it has not been waited for, so the number is still its own
                with suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)
            return
        _, status = os.waitpid(pid, 0)
        for each in (connection, end):
            with suppress(KeyError):
                self._selector.unregister(each)
        _tell(connection, code=os.waitstatus_to_exitcode(status))
        connection.close()
        os.close(end)
        del self._drivers[pid]

    def _become(self, request: Request, files: list[int], connection: socket.socket) -> None:
        """Have a new fork look like a process that was started by itself."""
        self._libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != self._pid:
            os._exit(1)
        os.setpgid(0, 0)
        self._selector.close()
        for mine in (self._listener, connection, *(theirs for theirs, _ in self._drivers.values())):
            mine.close()
        for _, end in self._drivers.values():
            os.close(end)
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.environ.clear()
        os.environ.update(request.environment)
        # Whoever looks reads this of the memory that the warm process was started with.
        if self._fingerprint:
            _overwrite(self._fingerprint, _FINGERPRINT_BYTES, request.environment.get(_FINGERPRINT, ""))
        if not request.arguments[0].endswith(
            ".py"
        ):  # Ray's workers write their titles there, and look for what was there
            _overwrite(*_command_line(), "\0".join([sys.executable, "-m", *request.arguments]))
        os.chdir(request.folder)
        os.umask(request.umask)
        sys.path[:] = request.path
        importlib.invalidate_caches()
        for name in [name for name in sys.modules if name.partition(".")[0] == "mlpipes"]:
            del sys.modules[name]  # ours may have changed since
        sys.modules["numpy"].random.seed()  # drivers are not to draw the same numbers; Python's own are seeded anew
        signal.pthread_sigmask(signal.SIG_SETMASK, request.blocked)


def _overwrite(address: int, room: int, text: str) -> None:
    """Write a text where there is room for so many bytes; what is too long is cut."""
    ctypes.memmove(address, os.fsencode(text)[: room - 1].ljust(room, b"\0"), room)


def _command_line() -> tuple[int, int]:
    """Where this process's command line lies in its memory, and how many bytes it takes; proc_pid_stat(5)."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(") ")[2].split()
    start, end = int(fields[45]), int(fields[46])
    return start, end - start


def _read(connection: socket.socket, files: list[int]) -> Request:
    """What is asked; the descriptors that come along are added to `files`. Raises OSError or ValueError if it breaks off."""
    connection.settimeout(_REQUEST_SECONDS)
    head, received, _, _ = socket.recv_fds(connection, 8, 3)
    files += received
    size, told = int.from_bytes(head, "big"), b""
    while len(told) < size:
        if not (more := connection.recv(min(size - len(told), 1 << 20))):
            raise ConnectionError("a request broke off")
        told += more
    if len(files) != 3:
        raise ConnectionError("input, output and errors did not come along")
    connection.setblocking(False)
    with suppress(BlockingIOError):
        if not connection.recv(1, socket.MSG_PEEK):
            raise ConnectionError("who asked has given up")
    connection.setblocking(True)
    return Request(**json.loads(told))


def _tell(connection: socket.socket, **what: int) -> None:
    with suppress(OSError):  # who asked has gone, which shows at the next look
        connection.sendall(json.dumps(what).encode() + b"\n")


def run_here(request: Request) -> int:
    """Run a request's program in this process; returns its exit code."""
    sys.argv, what = request.arguments, request.arguments[0]
    try:
        if what.endswith(".py"):  # Ray's workers
            runpy.run_path(what, run_name="__main__")
        else:
            runpy.run_module(what, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, int | None):
            return end.code or 0
        raise
    return 0


def main(arguments: Sequence[str]) -> int:
    """Serve on a socket; returns the exit code, of a driver's module in a driver."""
    from mlpipes.compute.imported import noted  # not in a stand-in, which imports this module, and has no time

    process = WarmProcess(socket.socket(fileno=int(arguments[0])), noted)
    gc.disable()
    for name in PRELOADED:
        importlib.import_module(name)
    # Half a second for each fork: it would go through 900,000 objects, and so get pages of its own for all of them.
    gc.freeze()
    gc.enable()
    request = process.serve()
    return 0 if request is None else run_here(request)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
