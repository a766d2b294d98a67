"""`mlpipes dev`: the Dagster UI and, if asked for, the MLflow UI, as children of one process that ends them."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from rich.console import Console

from mlpipes.assets.training import DAGSTER_UI_VARIABLE
from mlpipes.cli import dagster_home
from mlpipes.errors import ConfigError
from mlpipes.tracking.runs import UI_VARIABLE, default_uri

HOST = "127.0.0.1"


def serve(console: Console, port: int, mlflow_port: int | None) -> int:
    """Serve until interrupted; returns the exit code. Raises ConfigError if a port is taken."""
    for name, wanted in (("--port", port), ("--mlflow-port", mlflow_port)):
        if wanted is not None and not _is_free(wanted):
            raise ConfigError(f"port {wanted} is taken; choose another with {name}")
    # A crashed run is retried when the daemon reads its failure; it looks every 30 s unless told otherwise.
    environment = {"DAGSTER_EVENT_LOG_CONSUMER_DAEMON_INTERVAL_SECONDS": "1", **os.environ}
    environment |= {"DAGSTER_HOME": str(dagster_home()), DAGSTER_UI_VARIABLE: f"http://{HOST}:{port}"}
    programs = Path(sys.executable).parent
    commands = []
    if mlflow_port is not None:
        uri = default_uri()
        if not uri.startswith("http"):
            environment[UI_VARIABLE] = f"http://{HOST}:{mlflow_port}"
            commands.append(
                [programs / "mlflow", "ui", "--host", HOST, "--port", mlflow_port, "--backend-store-uri", uri]
            )
        console.print(f"MLflow UI:  {environment.get(UI_VARIABLE, uri)}")
    workspace = ["-w", "workspace.yaml"] if Path("workspace.yaml").is_file() else ["-m", "mlpipes.definitions"]
    commands.append([programs / "dagster", "dev", "-h", HOST, "-p", port, *workspace])
    console.print(f"Dagster UI: http://{HOST}:{port}")
    console.print("Trainings run in a private Ray that outlives this program; `mlpipes ray down` ends it.")
    # Installed before the children start: a signal that is ignored here (as in a background job of a shell) would stay
    # ignored in them, and `dagster dev` ends its own children by SIGINT.
    interrupted = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupted.set())
    # Children get sessions of their own, so that Ctrl-C reaches them once, through us.
    children = [subprocess.Popen(list(map(str, c)), env=environment, start_new_session=True) for c in commands]
    try:
        while not interrupted.wait(0.5) and all(child.poll() is None for child in children):
            pass
    finally:
        for child in children:
            _end(child)
    return 0 if interrupted.is_set() else 1


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End a child and everything that it started: by interrupt, which lets it clean up, and for good after a while."""
    for number, seconds in ((signal.SIGINT, 15), (signal.SIGKILL, 5)):
        try:
            if number == signal.SIGKILL:
                os.killpg(child.pid, number)
            else:
                child.send_signal(number)
            child.wait(seconds)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
