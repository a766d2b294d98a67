"""`mlpipes upscale` in a process of its own, with a home of its own, and the processes that it makes there."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from mlpipes.compute.processes import with_variable
from mlpipes_tests import evidence
from mlpipes_tests.sandbox import CHECKOUT
from mlpipes_tests.video.made import QUICK
from mlpipes_tests.waiting import until

DRIVER = "mlpipes.video.driver"


class Command:
    """Calls the command in one home folder."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {**os.environ, "MLPIPES_HOME": str(home), "PYTHONPATH": str(CHECKOUT), "COLUMNS": "160"}
        evidence.collect_from(home)

    def start(self, *arguments: str | Path, log: Path) -> "subprocess.Popen[bytes]":
        """Start it; what it says goes into a file."""
        command = [sys.executable, "-m", "mlpipes_tests.video.command", "upscale", *map(str, arguments)]
        command += ["--crf", str(QUICK.crf), "--preset", QUICK.preset]
        with log.open("ab") as output:
            return subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output, cwd=CHECKOUT, start_new_session=True
            )

    def run(self, *arguments: str | Path, log: Path) -> int:
        """Run it to its end; returns its exit code."""
        started = self.start(*arguments, log=log)
        until(lambda: started.poll() is not None, f"{arguments} ends; see {log}")
        return started.returncode

    def processes(self) -> list[psutil.Process]:
        """All that live of this home: the command, Ray's, the driver, the workers."""
        found: set[psutil.Process] = set()
        for process in with_variable("MLPIPES_HOME", str(self.home)):
            with suppress(psutil.Error):
                found |= {process, *process.children(recursive=True)}
        return sorted((p for p in found if p.is_running()), key=lambda p: p.pid)

    def driver(self) -> int:
        """The driver of the job that runs."""
        return self._one(DRIVER)

    def agent(self) -> int:
        """Ray's agent on the node: its raylet ends with it, by itself, and `ray start` does not."""
        return self._one("ray::DashboardAgent")

    def _one(self, name: str) -> int:
        return until(lambda: [p for p in self.processes() if name in " ".join(_words(p)[:4])], f"{name} runs")[0].pid


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def kill(pid: int) -> None:
    """End a process for good, without a word."""
    os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    from mlpipes.cli.app import app

    app()
