"""Control groups of a cluster: they hold every process of it, so that a node freezes, dies or is ended as one.

The name of a cluster's group says who owns it, so a leftover of a killed run is found by looking at the groups.
"""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")
_TRACKING = _MOUNT / "freezer"
"""Of the hierarchies this is the one that is asked who belongs to a group."""


def available() -> bool:
    """Whether this machine has control groups of version 1, which these are."""
    return (_TRACKING / "cgroup.procs").exists()


def named(prefix: str) -> list[str]:
    """The names of all top groups that begin so."""
    return [folder.name for folder in _TRACKING.glob(f"{prefix}*") if folder.is_dir()]


class Cgroup:
    """A group in every hierarchy, like `mlpipes-12-345` or `mlpipes-12-345/node-1`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def create(self) -> None:
        """Make the group, and those above it."""
        for hierarchy in _hierarchies():
            (hierarchy / self.path).mkdir(parents=True, exist_ok=True)
        above = _MOUNT / "cpuset"
        for part in Path(self.path).parts:  # a group without processors and memory takes no process
            for file in ("cpuset.cpus", "cpuset.mems"):
                (above / part / file).write_text((above / file).read_text())
            above /= part

    def joining(self, *command: str) -> list[str]:
        """The command that runs another one in this group."""
        return ["sh", "-c", f'echo 0 >{_TRACKING / self.path / "cgroup.procs"} && exec "$@"', "sh", *command]

    def pids(self) -> list[int]:
        """Every process in this group and in those below it."""
        found: list[int] = []
        for file in sorted((_TRACKING / self.path).rglob("cgroup.procs")):
            with suppress(OSError):  # the group is gone meanwhile
                found += map(int, file.read_text().split())
        return found

    def freeze(self) -> None:
        """Stop all of it at one moment, as if the machine hung."""
        state = self._state()
        state.write_text("FROZEN")
        while state.read_text().strip() != "FROZEN":
            time.sleep(0.01)

    def thaw(self) -> None:
        """Let it run on."""
        self._state().write_text("THAWED")

    def kill(self) -> None:
        """SIGKILL to all of it at one moment, and wait until it is gone; the group stays."""
        if not (_TRACKING / self.path).exists():
            return
        while self.pids():
            self.freeze()
            for pid in self.pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.thaw()
            time.sleep(0.05)

    def remove(self) -> None:
        """Remove the group, which holds no process any more, and those below it."""
        for hierarchy in _hierarchies():
            for folder, _, _ in os.walk(hierarchy / self.path, topdown=False):
                while True:
                    try:
                        Path(folder).rmdir()
                    except FileNotFoundError:
                        break
                    except OSError:  # busy: the kernel still buries its last process
                        time.sleep(0.05)
                    else:
                        break

    def _state(self) -> Path:
        return _TRACKING / self.path / "freezer.state"


def _hierarchies() -> list[Path]:
    return [
        folder
        for folder in _MOUNT.iterdir()
        if folder.is_dir()
        and not folder.is_symlink()
        and folder.name != "unified"
        and (folder / "cgroup.procs").exists()
    ]
