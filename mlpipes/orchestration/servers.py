"""Servers as child processes: kept alive one by one, ended with their parent, and what they print in one log file."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from mlpipes.compute.processes import kill, running
from mlpipes.errors import ConfigError, UserError

QUICK_SECONDS, QUICK_ENDS = 30.0, 3
"""A server that ends so soon after its start, so many times in a row, is not started again."""
_END_LINES = 20
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class ServerError(UserError):
    """A server does not start, or ends again and again; the message carries the end of its log."""


class ServerLog:
    """The file that takes what all servers of a session print; that of the session before is kept beside it.

    The servers write to it themselves. A pipe through this program would break when it dies, and with it whatever prints.
    """

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if it cannot be written."""
        self.path, self._shown = path, 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                path.replace(path.with_suffix(".previous" + path.suffix))
            self.stream = path.open("ab+", buffering=0)
        except OSError as error:
            raise ConfigError(f"the servers' log {path} cannot be written: {error.strerror}") from error

    @property
    def size(self) -> int:
        """Bytes written by now."""
        return os.fstat(self.stream.fileno()).st_size

    def since(self, offset: int) -> bytes:
        """What was written from a byte offset on."""
        return os.pread(self.stream.fileno(), max(0, self.size - offset), offset)

    def end(self, offset: int) -> str:
        """The last lines behind a byte offset, without colours, for an error message."""
        text = _COLOUR.sub("", self.since(offset).decode(errors="replace"))
        return "\n".join(line[:300] for line in text.splitlines()[-_END_LINES:])

    def show(self) -> None:
        """Copy to the terminal what was not yet."""
        new = self.since(self._shown)
        self._shown += len(new)
        with suppress(OSError):  # a terminal that is gone or full ends nothing
            sys.stdout.write(new.decode(errors="replace"))
            sys.stdout.flush()

    def close(self) -> None:
        """Close it; servers that still run keep it open for themselves."""
        self.stream.close()


class Server:
    """A server that is started again when it dies, unless it keeps dying at once."""

    def __init__(self, name: str, command: Sequence[Any], environment: Mapping[str, str], log: ServerLog) -> None:
        self.name, self.command, self.environment, self.log = name, list(map(str, command)), environment, log
        self.quick_ends, self.restarted = 0, float("-inf")
        self._start()

    def _start(self) -> None:
        # A session of its own, so that Ctrl-C reaches it once, through us; and it must not outlive us, for it would keep
        # the port. Only the main thread may start one: the kernel takes the end of the thread that did for the parent's.
        self.started, self.offset = time.monotonic(), self.log.size
        self.process = subprocess.Popen(
            self.command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=self.log.stream,
            stderr=self.log.stream,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )

    def keep_up(self) -> str | None:
        """Start it again if it died; returns how it did, or None. Raises ServerError if that is not worth it any more."""
        code = self.process.poll()
        if code is None:
            return None
        self.quick_ends = self.quick_ends + 1 if time.monotonic() - self.started < QUICK_SECONDS else 0
        self.end()  # what it left behind
        how = f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        if self.quick_ends == QUICK_ENDS:
            raise ServerError(
                f"{self.name} {how}, {QUICK_ENDS} times right after its start. The end of {self.log.path}:\n"
                f"{self.log.end(self.offset)}"
            )
        self._start()
        self.restarted = self.started
        return how

    def interrupt(self) -> None:
        """Ask it to end, which lets it clean up."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)

    def end(self) -> None:
        """End it and everything that it started: by interrupt first, and for good after a while."""
        self.interrupt()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        kill([process for process in running() if _group_of(process) == self.process.pid])
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what was just being started
        self.process.wait()


def _group_of(process: psutil.Process) -> int:
    try:
        return os.getpgid(process.pid)
    except OSError:
        return 0


def _end_with_parent() -> None:
    """Have the kernel interrupt this process when its parent dies, however it dies; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG
