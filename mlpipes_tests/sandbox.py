"""A folder like a user's checkout, with state of its own, in which tests run the real programs."""

import os
import random
import signal
import socket
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import requests
import yaml

from mlpipes_tests import evidence
from mlpipes_tests.barriers import HASTE, Barriers
from mlpipes_tests.waiting import LIMIT_SECONDS, until

CHECKOUT = Path(__file__).resolve().parents[1]
LOCATION = "mlpipes.definitions"
"""What Dagster calls the code location, whichever definitions it serves."""


class Sandbox:
    """The checkout's programs and settings in a folder of their own.

    `held`: the trainings of `digits` wait at barriers that the test closes. `definitions`: a module with other definitions
    than the project's.
    """

    def __init__(self, path: Path, *, held: bool = False, definitions: str | None = None) -> None:
        self.path, self.home = path, path / ".mlpipes"
        for name in ("Makefile", "pyproject.toml", "constraints.txt", "dagster.yaml", "workspace.yaml", ".venv"):
            (path / name).symlink_to(CHECKOUT / name)
        # Not what tests of this process have set, for its own use.
        unwanted = ("MLPIPES_", "DAGSTER_", "MLFLOW_", "PYTEST_", "RAY_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(unwanted)}
        self.environment |= {name: value for name, value in os.environ.items() if name == HASTE}
        self.environment |= {"MLPIPES_HOME": str(self.home), "COLUMNS": "160"}
        self.barriers = Barriers(self.home)
        if served := definitions or ("mlpipes_tests.held_definitions" if held else None):
            (path / "workspace.yaml").unlink()
            module = {"module_name": served, "location_name": LOCATION}
            (path / "workspace.yaml").write_text(yaml.safe_dump({"load_from": [{"python_module": module}]}))
            self.environment["PYTHONPATH"] = str(CHECKOUT)
        evidence.collect_from(path)

    def run(self, command: str, timeout: float = LIMIT_SECONDS, **environment: str) -> subprocess.CompletedProcess[str]:
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

    def start(self, *command: str, log: str = "server.log", **environment: str) -> "subprocess.Popen[bytes]":
        """Start a server in a session of its own."""
        known = self.environment | environment
        with (self.path / log).open("ab") as output:
            return subprocess.Popen(
                command, cwd=self.path, env=known, stdout=output, stderr=output, start_new_session=True
            )


def end(server: "subprocess.Popen[bytes]", seconds: float = 60) -> None:
    """End a server by interrupt; if it does not, kill it and all that it started."""
    started = descendants(server.pid)
    if server.poll() is None:
        server.send_signal(signal.SIGINT)
    try:
        server.wait(seconds)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    for process in started:
        try:
            process.wait(5)
        except psutil.TimeoutExpired:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        except FileNotFoundError:  # what gVisor's kernel says of one that is just ending
            continue


def descendants(pid: int) -> list[psutil.Process]:
    """What a process has started, and that in turn; nothing if it is gone."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


_given: set[int] = set()


def free_port() -> int:
    """A free port that nobody gets unasked: not of the range that the system gives to connections and to port 0."""
    chosen = random.SystemRandom()
    while True:
        with socket.socket() as probe, suppress(OSError):
            port = chosen.randrange(10_000, 32_000)
            probe.bind(("127.0.0.1", port))
            if port not in _given:  # to somebody who has not begun to listen
                _given.add(port)
                return port


def answers(address: str) -> bool:
    """Whether a server answers."""
    try:
        return requests.get(address, timeout=10).ok
    except requests.RequestException:
        return False


def wait_for(address: str, server: "subprocess.Popen[bytes] | None" = None) -> None:
    """Wait until a server answers. Raises AssertionError, at once if its process has ended."""

    def ended() -> str:
        return "" if server is None or server.poll() is None else f"its process ended with {server.returncode}"

    until(lambda: answers(address), f"{address} answers", vain=ended)


def graphql(address: str, query: str, **variables: Any) -> Any:
    """Ask a Dagster webserver."""
    reply = requests.post(f"{address}/graphql", json={"query": query, "variables": variables}, timeout=120).json()
    if "errors" in reply:
        raise RuntimeError(str(reply["errors"])[:1000])
    return reply["data"]
