"""The lease: which job may write a training's folder, so that two trainings of one partition can never mix."""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from mlpipes.errors import CorruptionError, LeaseLostError
from mlpipes.store.files import quarantine, read_record, write_record

_LOCK_SECONDS = 60


@dataclass(frozen=True)
class Lease:
    """The right to write a training's folder, held by whoever took it last.

    Taking the lease raises its token, so a holder that was thought dead and wakes up late (a paused process, a node that
    was cut off) finds a greater token at its next write and stops: a fencing token (Kleppmann 2016, "How to do
    distributed locking"). Nobody has to decide whether a holder is still alive.
    """

    path: Path
    token: int

    @classmethod
    def take(cls, folder: Path, holder: str) -> "Lease":
        """Take the lease of a folder from whoever has it."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "lease.json"
        with _locked(path):
            token = _token(path) + 1
            write_record(
                path,
                {
                    "token": token,
                    "holder": holder,
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                    "taken": time.time(),
                },
            )
        return cls(path, token)

    def check(self) -> None:
        """Raises LeaseLostError if somebody else has taken the lease since."""
        if (current := _token(self.path)) != self.token:
            raise LeaseLostError(
                f"the lease {self.path} was taken over (token {current}, ours {self.token}): another job continues this "
                "training, and this one stops without writing"
            )

    def is_lost(self) -> bool:
        """Whether somebody else has certainly taken it; what cannot be read just now is for the next write to find out."""
        try:
            return int(read_record(self.path)["token"]) != self.token
        except (FileNotFoundError, CorruptionError):
            return False

    def guarded(self) -> "_Guard":
        """A context in which the lease is ours and stays so: taking it waits until the context ends."""
        return _Guard(self)


class _Guard:
    def __init__(self, lease: Lease) -> None:
        self.lease, self.lock = lease, _locked(lease.path)

    def __enter__(self) -> None:
        self.lock.__enter__()
        try:
            self.lease.check()
        except BaseException:
            self.lock.__exit__(None, None, None)
            raise

    def __exit__(self, *error: object) -> None:
        self.lock.__exit__(None, None, None)


class _locked:  # noqa: N801 - used as a function
    """A file lock beside a path that says what holds it up when it cannot be had."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, FileLock(str(path) + ".lock", timeout=_LOCK_SECONDS)

    def __enter__(self) -> None:
        try:
            self.lock.acquire()
        except Timeout as error:
            raise LeaseLostError(
                f"{self.lock.lock_file} is held for over {_LOCK_SECONDS} s by a process that hangs"
            ) from error

    def __exit__(self, *error: object) -> None:
        self.lock.release()


def _token(path: Path) -> int:
    try:
        return int(read_record(path)["token"])
    except FileNotFoundError:
        return 0
    except CorruptionError:
        # What the token was is lost; time in ms is greater than any count of attempts, so that older holders stop.
        quarantine(path)
        write_record(path, {"token": (token := int(time.time() * 1000)), "holder": "restored after corruption"})
        return token
