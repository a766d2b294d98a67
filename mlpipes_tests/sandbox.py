"""A folder like a user's checkout, with state of its own, in which tests run the real programs."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import requests

CHECKOUT = Path(__file__).resolve().parents[1]


class Sandbox:
    """The checkout's programs and settings in a folder of their own."""

    def __init__(self, path: Path) -> None:
        self.path, self.home = path, path / ".mlpipes"
        for name in ("Makefile", "pyproject.toml", "constraints.txt", "dagster.yaml", "workspace.yaml", ".venv"):
            (path / name).symlink_to(CHECKOUT / name)
        unwanted = ("MLPIPES_", "DAGSTER_", "MLFLOW_", "PYTEST_", "RAY_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(unwanted)}
        self.environment |= {"MLPIPES_HOME": str(self.home), "COLUMNS": "160"}

    def run(self, command: str, timeout: float = 500, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a shell command to its end.

        Its output goes to files: whatever it leaves behind (Dagster's `tail` of a run's log, say) would keep a pipe open.
        """
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8") as out,
            tempfile.TemporaryFile("w+", encoding="utf-8") as error,
        ):
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=self.path,
                env=self.environment | environment,
                stdout=out,
                stderr=error,
                timeout=timeout,
            )
            out.seek(0)
            error.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, out.read(), error.read())

    def start(self, *command: str, log: str = "server.log") -> "subprocess.Popen[bytes]":
        """Start a server in a session of its own."""
        with (self.path / log).open("ab") as output:
            return subprocess.Popen(
                command, cwd=self.path, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )


def end(server: "subprocess.Popen[bytes]", seconds: float = 40) -> None:
    """End a server by interrupt; if it does not, kill it and all that it started."""
    descendants = _descendants(server.pid)
    if server.poll() is None:
        server.send_signal(signal.SIGINT)
    try:
        server.wait(seconds)
    except subprocess.TimeoutExpired:
        server.kill()
    for process in descendants:
        try:
            process.wait(5)
        except psutil.TimeoutExpired:
            process.kill()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def free_port() -> int:
    """A port that the system says is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(address: str) -> bool:
    """Whether a server answers."""
    try:
        return requests.get(address, timeout=2).ok
    except requests.RequestException:
        return False


def wait_for(address: str, seconds: float = 90) -> None:
    """Wait until a server answers. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not answers(address):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{address} did not answer within {seconds:.0f} s")
        time.sleep(0.3)


def graphql(address: str, query: str, **variables: Any) -> Any:
    """Ask a Dagster webserver."""
    reply = requests.post(f"{address}/graphql", json={"query": query, "variables": variables}, timeout=30).json()
    if "errors" in reply:
        raise RuntimeError(str(reply["errors"])[:1000])
    return reply["data"]
