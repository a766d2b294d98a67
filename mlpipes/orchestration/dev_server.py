"""`mlpipes dev`: the Dagster UI and, if asked for, the MLflow UI, kept alive by one process and ended with it."""

import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dagster as dg
from filelock import FileLock, Timeout
from rich.console import Console

from mlpipes.compute.local import LocalRay
from mlpipes.compute.places import is_local
from mlpipes.compute.ray_node import short_folder
from mlpipes.errors import ConfigError, CorruptionError, UserError
from mlpipes.orchestration.backfill import DEV_NOTE
from mlpipes.orchestration.code_servers import code_servers, heal, is_loaded, option
from mlpipes.orchestration.instance import check_run_launcher, dagster_home
from mlpipes.orchestration.run_news import RunNews
from mlpipes.orchestration.schedules import night_of_environment
from mlpipes.orchestration.servers import Server, ServerError, ServerLog
from mlpipes.orchestration.training import DAGSTER_UI_VARIABLE
from mlpipes.orchestration.warm_runs import AHEAD_VARIABLE
from mlpipes.store.environment import for_children
from mlpipes.store.files import read_record, write_record
from mlpipes.store.layout import home
from mlpipes.store.redaction import redact
from mlpipes.tracking.runs import UI_VARIABLE, default_uri, public_uri

HOST = "127.0.0.1"
CHECK_SECONDS = 1.0
LOAD_SECONDS = 600.0
"""How long a code server may take to load its definitions: minutes on a machine that is busy with trainings."""
FOLLOWS_SECONDS = 60.0
"""So long after a code server was started again, code that cannot be reached is a consequence, and no news."""
_DEFAULTS = {
    # A crashed run is retried when the daemon reads its failure; it looks every 30 s unless told otherwise.
    "DAGSTER_EVENT_LOG_CONSUMER_DAEMON_INTERVAL_SECONDS": "1",
    # Dagster's own 60 s and 30 s may pass where trainings take all of the processors: runs fail, and code servers end.
    "DAGSTER_GRPC_TIMEOUT_SECONDS": "300",
    "DAGSTER_GRPC_PROXY_HEARTBEAT_TTL_SECONDS": "120",
    # Eight more processes for jobs that judge traces of language models: 1 GB, and a quarter of a core for nothing.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}
"""What the servers are told, unless the user tells them something else."""


def serve(console: Console, port: int, mlflow_port: int | None, verbose: bool = False) -> None:
    """Serve until interrupted.

    Starts the code server, the daemon and the webserver that `dagster dev` would start, each by itself: `dagster dev` ends
    all of them when one dies, and every run with them, where starting that one again leaves the others undisturbed.

    Raises ConfigError if a port is taken, if another one serves this home folder or the definitions do not load, and
    ServerError if a server does not stay up.
    """
    cron, zone = night_of_environment()
    is_local()
    dagster_home()
    default_uri()
    with _only_one(port):
        _serve(console, port, mlflow_port, verbose, f"Nightly evaluations: {cron} ({zone})" if cron else "")


@contextmanager
def _only_one(port: int) -> Iterator[None]:
    """Two on one home would share its log, and their daemons would launch everything twice. Raises ConfigError."""
    home().mkdir(parents=True, exist_ok=True)
    lock, note = FileLock(str(home() / "dev.lock"), blocking=False), home() / DEV_NOTE
    try:
        lock.acquire()
    except Timeout:
        try:
            other = "Dagster UI: http://{}:{port}, process {pid}".format(HOST, **read_record(note))
        except (OSError, CorruptionError, KeyError):
            other = "it is starting"
        raise ConfigError(
            f"another `mlpipes dev` serves {home()} already ({other}). Use that one, end it, or set MLPIPES_HOME to another "
            "folder"
        ) from None
    try:
        write_record(note, {"port": port, "pid": os.getpid()})
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def _serve(console: Console, port: int, mlflow_port: int | None, verbose: bool, night: str) -> None:
    for name, wanted in (("--port", port), ("--mlflow-port", mlflow_port)):
        if wanted is not None and not _is_free(wanted):
            raise ConfigError(f"port {wanted} is taken; choose another with {name}")
    # Installed before the servers start: a signal that is ignored here (as in a background job of a shell) would stay
    # ignored in them.
    interrupted = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupted.set())
    log = ServerLog(home() / "logs" / "dev.log")
    session = _Session(console, port, mlflow_port, log, verbose)
    if night:
        session.say(night)
    session.say(
        f"Starting Dagster. What its servers print: {log.path}{'' if verbose else ' (--verbose shows it here)'}"
    )
    try:
        with dg.DagsterInstance.from_config(session.environment["DAGSTER_HOME"]) as instance:
            folder = short_folder("mlpipes-dev-")  # for Unix sockets; nobody else's, for a socket runs code
            try:
                session.run(instance, folder, interrupted)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        log.close()


class _Session:
    """One run of `mlpipes dev`."""

    def __init__(self, console: Console, port: int, mlflow_port: int | None, log: ServerLog, verbose: bool) -> None:
        self.console, self.port, self.mlflow_port, self.log, self.verbose = console, port, mlflow_port, log, verbose
        self.ui = f"http://{HOST}:{port}"
        self.environment = {**_DEFAULTS, **for_children()}
        self.environment |= {"DAGSTER_HOME": str(dagster_home()), DAGSTER_UI_VARIABLE: self.ui, AHEAD_VARIABLE: "1"}
        self.servers: list[Server] = []
        self.code: dict[str, Server] = {}
        """Code servers by the name of their code location."""
        self.unreachable: set[str] = set()
        self.asked: dict[str, float] = {}
        self.announced: list[tuple[str, str]] = []
        """(line, address): to be said as soon as the address answers."""

    def say(self, text: str, style: str | None = None) -> None:
        """One line for the person at the terminal; a terminal that is gone or full ends nothing."""
        with suppress(OSError):
            self.console.print(redact(text), style=style, markup=False, highlight=False, soft_wrap=True)

    def tell(self, text: str, style: str | None = None) -> None:
        """The same, with the time, for what happens later on."""
        self.say(f"{time.strftime('%H:%M:%S')} {text}", style)

    def run(self, instance: dg.DagsterInstance, folder: Path, interrupted: threading.Event) -> None:
        """Start the servers, and keep them up until interrupted."""
        unfinished = _prepare_storage(instance)
        news = RunNews(instance, self.ui)
        if unfinished and LocalRay().died():
            # The retries of these runs will want it in half a minute, and it takes a third of that to start.
            self.tell("The private Ray has died; it is started again, for runs are unfinished.")
            threading.Thread(target=_start_ray, daemon=True).start()
        try:
            options, workspace = code_servers(Path("workspace.yaml"), folder)
            self._start_mlflow()
            if not self._load(options, interrupted):
                return
            self._start_the_others(workspace)
            while not interrupted.wait(CHECK_SECONDS):
                self._look()
                for line in news.lines():
                    self.tell(line, "red" if " failed: " in line else None)
        finally:
            if self.servers:
                self.say("Ending Dagster's servers …")
            for server in self.servers:
                server.interrupt()
            for server in self.servers:
                server.end()
            if self.verbose:
                self.log.show()

    def _load(self, options: Sequence[list[str]], interrupted: threading.Event) -> bool:
        """Start the code servers and wait until they have loaded; returns whether they did before an interruption."""
        sockets = {}
        for one in options:
            name = option(one, "--location-name")
            label = "Dagster's code server" + (f" for {name}" if len(options) > 1 else "")
            self.code[name] = self._start(label, "dagster", "code-server", "start", *one)
            sockets[name] = option(one, "-s")
        deadline = time.monotonic() + LOAD_SECONDS
        while sockets:
            if interrupted.wait(0.2):
                return False
            self._look_after_servers()
            self._announce()
            for name in list(sockets):
                try:
                    if is_loaded(sockets[name]):
                        del sockets[name]
                except ConfigError as error:
                    raise ConfigError(
                        f"the definitions of {name} do not load. {error}\nMore: {self.log.path}"
                    ) from error
            if sockets and time.monotonic() > deadline:
                server = self.code[next(iter(sockets))]
                raise ServerError(
                    f"{server.name} has not loaded within {LOAD_SECONDS:.0f} s. The end of {self.log.path}:\n"
                    f"{self.log.end(server.offset)}"
                )
        return True

    def _start_mlflow(self) -> None:
        if self.mlflow_port is None:
            return
        uri, address = default_uri(), f"http://{HOST}:{self.mlflow_port}"
        if uri.startswith("http"):
            self.say(f"MLflow UI:  {self.environment.get(UI_VARIABLE) or public_uri(uri)}")
            return
        self.environment[UI_VARIABLE] = address
        self.announced.append((f"MLflow UI:  {address}", f"{address}/health"))
        # One worker: on a laptop one person looks at it, and each imports all of MLflow.
        # The address is no option: it may hold a password, and everybody sees the options of a process.
        self.environment["MLFLOW_BACKEND_STORE_URI"] = uri
        self._start("The MLflow UI", "mlflow", "ui", "--host", HOST, "--port", self.mlflow_port, "--workers", 1)

    def _start_the_others(self, workspace: Path) -> None:
        """Start what asks the code servers, which otherwise would fill the log with not finding them."""
        self.announced.append((f"Dagster UI: {self.ui}", f"{self.ui}/server_info"))
        self._start("Dagster's daemon", "dagster-daemon", "run", "-w", workspace)
        self._start("Dagster's webserver", "dagster-webserver", "-h", HOST, "-p", self.port, "-w", workspace)

    def _start(self, name: str, program: str, *options: Any) -> Server:
        server = Server(name, [Path(sys.executable).parent / program, *options], self.environment, self.log)
        self.servers.append(server)
        return server

    def _look(self) -> None:
        """Keep everything up, and say what has changed."""
        self._look_after_servers()
        self._announce()
        dead = heal(f"{self.ui}/graphql", self.asked)
        if dead is None:
            return
        for name in sorted(dead - self.unreachable):
            server = self.code.get(name)
            if server is None or time.monotonic() - server.restarted > FOLLOWS_SECONDS:
                self.tell(f"The code of {name} was not reachable any more; it is started again.", "yellow")
        self.unreachable = dead

    def _announce(self) -> None:
        for line, address in list(self.announced):
            if _answers(address):
                self.say(line)
                self.announced.remove((line, address))
                if line.startswith("Dagster"):
                    self.say("Trainings run in a private Ray that outlives this program; `mlpipes ray down` ends it.")

    def _look_after_servers(self) -> None:
        if self.verbose:
            self.log.show()
        for server in self.servers:
            if how := server.keep_up():
                self.tell(f"{server.name} {how}; it was started again.", "yellow")


def _prepare_storage(instance: dg.DagsterInstance) -> bool:
    """Have Dagster create its tables: daemon and webserver, started at once, would trip over each other.

    Returns whether a run of an earlier session is unfinished.
    """
    unfinished = [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED]
    instance.get_asset_keys(limit=1)
    instance.all_instigator_state()
    check_run_launcher(instance)
    return bool(instance.get_run_records(dg.RunsFilter(statuses=unfinished), limit=1))


def _start_ray() -> None:
    with suppress(UserError):  # whoever needs it says what is wrong
        LocalRay().ensure()


def _answers(address: str) -> bool:
    import requests

    try:
        return requests.get(address, timeout=5).ok
    except requests.RequestException:
        return False


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
