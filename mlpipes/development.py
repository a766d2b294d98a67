"""`mlpipes dev`: the Dagster UI and, if asked for, the MLflow UI, kept alive by one process and ended with it."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from mlpipes.assets.training import DAGSTER_UI_VARIABLE
from mlpipes.cli import dagster_home
from mlpipes.compute.local import LocalRay
from mlpipes.errors import ConfigError, UserError
from mlpipes.tracking.runs import UI_VARIABLE, default_uri

HOST = "127.0.0.1"
CHECK_SECONDS = 1.0
QUICK_SECONDS, QUICK_ENDS = 30.0, 3
"""A server that ends so soon after its start, so many times in a row, is not started again."""
_LOCATIONS = """{ workspaceOrError { ... on Workspace { locationEntries { name locationOrLoadError {
  ... on PythonError { message } } } } } }"""
_RELOAD = 'mutation { reloadRepositoryLocation(repositoryLocationName: "%s") { __typename } }'


def serve(console: Console, port: int, mlflow_port: int | None) -> int:
    """Serve until interrupted; returns the exit code. Raises ConfigError if a port is taken.

    Starts the code server, the daemon and the webserver that `dagster dev` would start, each by itself: `dagster dev` ends
    all of them when one dies, and every run with them, where starting that one again leaves the others undisturbed.
    """
    for name, wanted in (("--port", port), ("--mlflow-port", mlflow_port)):
        if wanted is not None and not _is_free(wanted):
            raise ConfigError(f"port {wanted} is taken; choose another with {name}")
    # A crashed run is retried when the daemon reads its failure; it looks every 30 s unless told otherwise.
    environment = {"DAGSTER_EVENT_LOG_CONSUMER_DAEMON_INTERVAL_SECONDS": "1", **os.environ}
    environment |= {"DAGSTER_HOME": str(dagster_home()), DAGSTER_UI_VARIABLE: f"http://{HOST}:{port}"}
    if _prepare_storage(environment["DAGSTER_HOME"]) and LocalRay().died():
        # The retries of these runs will want it in half a minute, and it takes a third of that to start.
        threading.Thread(target=_start_ray, daemon=True).start()
    programs = Path(sys.executable).parent
    commands: list[list[Any]] = []
    if mlflow_port is not None:
        uri = default_uri()
        if not uri.startswith("http"):
            environment[UI_VARIABLE] = f"http://{HOST}:{mlflow_port}"
            commands.append(
                [programs / "mlflow", "ui", "--host", HOST, "--port", mlflow_port, "--backend-store-uri", uri]
            )
        console.print(f"MLflow UI:  {environment.get(UI_VARIABLE, uri)}")
    # Short, for it holds Unix sockets (their paths may have 107 characters), and nobody else's: a socket runs code.
    with tempfile.TemporaryDirectory(prefix="mlpipes-dev-") as folder:
        servers, workspace = code_servers(Path("workspace.yaml"), Path(folder))
        commands += [[programs / "dagster", "code-server", "start", *options] for options in servers]
        commands.append([programs / "dagster-daemon", "run", "-w", workspace])
        commands.append([programs / "dagster-webserver", "-h", HOST, "-p", port, "-w", workspace])
        console.print(f"Dagster UI: http://{HOST}:{port}")
        console.print("Trainings run in a private Ray that outlives this program; `mlpipes ray down` ends it.")
        return _keep_up(console, commands, environment, f"http://{HOST}:{port}/graphql")


def _prepare_storage(folder: str) -> bool:
    """Have Dagster create its tables: daemon and webserver, started at once, would trip over each other.

    Returns whether a run of an earlier session is unfinished.
    """
    import dagster as dg

    unfinished = [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED]
    with dg.DagsterInstance.from_config(folder) as instance:
        instance.get_asset_keys(limit=1)
        instance.all_instigator_state()
        return bool(instance.get_run_records(dg.RunsFilter(statuses=unfinished), limit=1))


def _start_ray() -> None:
    with suppress(UserError):  # whoever needs it says what is wrong
        LocalRay().ensure()


def code_servers(workspace: Path, folder: Path) -> tuple[list[list[str]], Path]:
    """Options of the code servers of a workspace file's Python modules, and a workspace file in `folder` that names them.

    Entries of other kinds are taken over as they are. Without a file, there is one server, with this program's definitions.
    Raises ConfigError for a file that is no workspace.
    """
    try:
        entries = yaml.safe_load(workspace.read_text(encoding="utf-8"))["load_from"]
    except FileNotFoundError:
        entries = [{"python_module": "mlpipes.definitions"}]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f"{workspace.absolute()} is not a workspace file with a list `load_from`: {error}") from error
    servers, taken_over = [], []
    for number, entry in enumerate(entries):
        module = entry.get("python_module")
        if module is None:
            taken_over.append(entry)
            continue
        described = {"module_name": module} if isinstance(module, str) else module
        name, socket_path = described["module_name"], str(folder / f"{number}.sock")
        location = described.get("location_name") or name
        directory = str(Path(described.get("working_directory", ".")).absolute())
        servers.append(["-m", name, "-s", socket_path, "-d", directory, "--location-name", location])
        taken_over.append({"grpc_server": {"socket": socket_path, "location_name": location}})
    path = folder / "workspace.yaml"
    path.write_text(yaml.safe_dump({"load_from": taken_over}), encoding="utf-8")
    return servers, path


def _keep_up(console: Console, commands: list[list[Any]], environment: Mapping[str, str], graphql: str) -> int:
    # Installed before the children start: a signal that is ignored here (as in a background job of a shell) would stay
    # ignored in them.
    interrupted = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupted.set())
    children = [_Child(list(map(str, command)), environment) for command in commands]
    try:
        while not interrupted.wait(CHECK_SECONDS):
            for child in children:
                if not child.keep_up():
                    console.print(
                        f"[red]{child.command[0]} ended {QUICK_ENDS} times right after its start; giving up.[/]"
                    )
                    return 1
            _heal_code_server(graphql)
    finally:
        for child in children:
            child.interrupt()
        for child in children:
            child.end()
    return 0


class _Child:
    """A server that is started again when it dies, unless it keeps dying at once."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self.command, self.environment, self.quick_ends = command, environment, 0
        self._start()

    def _start(self) -> None:
        # A session of its own, so that Ctrl-C reaches it once, through us; and it must not outlive us, for it would keep
        # the port.
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            self.command, env=self.environment, start_new_session=True, preexec_fn=_end_with_parent
        )

    def keep_up(self) -> bool:
        """Start it again if it died; returns whether it is worth it."""
        if self.process.poll() is None:
            return True
        self.quick_ends = self.quick_ends + 1 if time.monotonic() - self.started < QUICK_SECONDS else 0
        self.end()  # what it left behind
        if self.quick_ends == QUICK_ENDS:
            return False
        self._start()
        return True

    def interrupt(self) -> None:
        """Ask it to end, which lets it clean up."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)

    def end(self) -> None:
        """End it and everything that it started: by interrupt first, and for good after a while."""
        self.interrupt()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _end_with_parent() -> None:
    """Have the kernel interrupt this process when its parent dies, however it dies; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG


def _heal_code_server(address: str) -> None:
    """Have Dagster start its code server again if that died: by itself it waits for somebody to press "Reload"."""
    import requests

    def ask(query: str) -> Any:
        return requests.post(address, json={"query": query}, timeout=5).json()["data"]

    try:
        for entry in ask(_LOCATIONS)["workspaceOrError"].get("locationEntries", []):
            if "DagsterUserCodeUnreachableError" in (entry["locationOrLoadError"] or {}).get("message", ""):
                ask(_RELOAD % entry["name"])
    except (requests.RequestException, ValueError, KeyError, TypeError, AttributeError):
        return  # it is starting, or busy: the next look tells


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
