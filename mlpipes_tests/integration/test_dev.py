"""`mlpipes dev` as a user sees it: a quiet first screen, a line per event, clear errors, a quiet end."""

import json
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlpipes.orchestration.dev_server import FOLLOWS_SECONDS
from mlpipes_tests.sandbox import Sandbox, answers, end, free_port, graphql
from mlpipes_tests.waiting import LIMIT_SECONDS, until

SCALE = "w1-b128-e30-g0"
NOISE = ("Traceback", "Stack Trace", "WARNING", "INFO", "ERROR", "UserWarning", "dagster.")
_LAUNCH = """mutation($params: ExecutionParams!) { launchRun(executionParams: $params) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""


def command_of(process: psutil.Process) -> str:
    """A process's command line; empty if it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


class Dev:
    """A running `mlpipes dev` and its screen."""

    def __init__(self, sandbox: Sandbox, *options: str, mlflow: int | None = None) -> None:
        self.sandbox, self.port, self.mlflow = sandbox, free_port(), mlflow
        self.ui = f"http://127.0.0.1:{self.port}"
        self.screen = sandbox.path / f"screen-{self.port}.log"
        command = [".venv/bin/mlpipes", "dev", "--port", str(self.port), *options]
        command += ["--mlflow", "--mlflow-port", str(mlflow)] if mlflow else []
        self.process = sandbox.start(*command, log=self.screen.name)

    @property
    def lines(self) -> list[str]:
        return self.screen.read_text().splitlines()

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait for a condition, in vain if it ended; what there is to know is in the logs."""
        return until(condition, what, vain=lambda: "" if self.process.poll() is None else "it ended")

    def line(self, pattern: str) -> str:
        """The first line that matches, as soon as there is one."""
        return self.until(lambda: next((x for x in self.lines if re.search(pattern, x)), None), pattern)

    def ready(self) -> "Dev":
        if self.mlflow:
            self.line("^MLflow UI:")
        self.line("^Trainings run")
        self.first_lines, self.first_log = self.lines, (self.sandbox.home / "logs" / "dev.log").read_text()
        return self

    def launch(self, asset: str, partition: str) -> dict[str, Any]:
        """Launch one asset of digits, as the launchpad does."""
        selector = {"repositoryLocationName": "mlpipes.definitions", "repositoryName": "__repository__"}
        parameters = {
            "selector": {**selector, "jobName": "digits_chain", "assetSelection": [{"path": ["digits", asset]}]},
            "runConfigData": json.dumps({}),
            "executionMetadata": {"tags": [{"key": "dagster/partition", "value": partition}]},
        }
        return graphql(self.ui, _LAUNCH, params=parameters)["launchRun"]

    def code_processes(self) -> tuple[psutil.Process, psutil.Process]:
        """The code server that Dagster calls a proxy, and the process below it that has loaded the code."""
        found: list[psutil.Process] = []

        def look() -> bool:
            proxies = [p for p in psutil.Process(self.process.pid).children() if "code-server" in command_of(p)]
            inner = [q for p in proxies for q in p.children() if " api grpc " in command_of(q)]
            found[:] = [*proxies, *inner]
            return len(found) == 2

        self.until(look, "the code server and its process run")
        return found[0], found[1]

    def settled(self) -> tuple[psutil.Process, psutil.Process]:
        """The same, once they have loaded the code, and no server was started again so lately that one line is of both."""

        def calm() -> bool:
            log = (self.sandbox.home / "logs" / "dev.log").read_text(errors="replace")
            again = [line[:8] for line in self.lines if "started again" in line]
            ago = (
                datetime.now() - datetime.combine(datetime.now(), time.fromisoformat(again[-1]))
                if again
                else timedelta(1)
            )
            loaded = (
                f"Started Dagster code server for module mlpipes.definitions in process {self.code_processes()[1].pid}"
            )
            return f"{loaded}\n" in log and (ago.days > 0 or ago.seconds > FOLLOWS_SECONDS) and self.serves_code()

        self.until(calm, "what was started again has settled")
        return self.code_processes()

    def serves_code(self) -> bool:
        """Whether the webserver knows the jobs."""
        try:
            return "digits_chain" in str(
                graphql(self.ui, "{ repositoriesOrError { ... on RepositoryConnection { nodes { jobs { name } } } } }")
            )
        except (OSError, RuntimeError, ValueError):
            return False


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("dev"))


@pytest.fixture(scope="module")
def dev(sandbox: Sandbox) -> Iterator[Dev]:
    """A session that is shared; whatever happens in it, there is no noise on its screen."""
    started = Dev(sandbox, mlflow=free_port())
    try:
        yield started.ready()
    finally:
        end(started.process)
    assert not [line for line in started.lines if any(word in line for word in NOISE)], started.lines


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    """A home that no session serves."""
    return Sandbox(tmp_path_factory.mktemp("elsewhere"))


def test_the_first_screen_is_quiet(dev: Dev) -> None:
    first, *others = dev.first_lines[:4]
    assert (
        first == f"Starting Dagster. What its servers print: {dev.sandbox.home}/logs/dev.log (--verbose shows it here)"
    )
    assert sorted(others) == [
        f"Dagster UI: {dev.ui}",
        f"MLflow UI:  http://127.0.0.1:{dev.mlflow}",
        "Trainings run in a private Ray that outlives this program; `mlpipes ray down` ends it.",
    ]
    assert others.index(f"Dagster UI: {dev.ui}") < others.index(
        "Trainings run in a private Ray that outlives this program; `mlpipes ray down` ends it."
    )
    assert answers(f"{dev.ui}/server_info"), "the address is said when it answers"
    assert "Started Dagster code server" in dev.first_log, "all of it is in the log"
    assert "Could not reach user code server" not in dev.first_log, "nobody asked before the code server listened"


def test_the_servers_are_told_to_be_patient_and_mlflow_to_run_no_jobs(dev: Dev) -> None:
    """Eight processes of MLflow for jobs that nobody has took a quarter of a core for as long as it ran."""
    servers = {command_of(p): p.environ() for p in psutil.Process(dev.process.pid).children()}
    (mlflow,) = [environment for command, environment in servers.items() if "mlflow ui" in command]
    (daemon,) = [environment for command, environment in servers.items() if "dagster-daemon run" in command]
    assert mlflow["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert daemon["DAGSTER_GRPC_TIMEOUT_SECONDS"] == "300"
    assert "huey" not in str([command_of(p) for p in psutil.Process(dev.process.pid).children(recursive=True)])


def test_a_run_is_told_when_it_starts_and_when_it_succeeds(dev: Dev) -> None:
    """Once with its link, also if it is over before it could be said that it had started."""
    dev.until(dev.serves_code, "the code is served")
    run_id = dev.launch("dataset", SCALE)["run"]["runId"]
    dev.line(rf"^\d\d:\d\d:\d\d digits_chain {SCALE} succeeded after \d+ s")
    told = [line for line in dev.lines if f"digits_chain {SCALE}" in line]
    assert [line.endswith(f"{dev.ui}/runs/{run_id}") for line in told] == [True] + [False] * (len(told) - 1)


def test_runs_are_forked_from_a_warm_process_and_another_takes_its_place(dev: Dev) -> None:
    def run() -> psutil.Process:
        """The warm process after a run."""

        def succeeded() -> int:
            return sum("succeeded after" in line for line in dev.lines)

        dev.until(dev.serves_code, "the code is served")
        before = succeeded()
        dev.launch("dataset", SCALE)
        dev.until(lambda: succeeded() > before, "the run succeeds")
        servers = psutil.Process(dev.process.pid).children(recursive=True)
        (warm,) = [process for process in servers if "'dagster._grpc.impl'" in command_of(process)]
        return warm

    warm = run()
    imported = {mapped.path for mapped in warm.memory_maps()}
    assert any("libtorch_cpu" in path for path in imported), "it has imported what runs need"
    assert "'mlpipes" not in command_of(warm), "but nothing that a reload is to read again"
    warm.kill()
    assert run().pid != warm.pid


def test_a_run_that_fails_is_told_with_its_cause(dev: Dev) -> None:
    dev.until(dev.serves_code, "the code is served")
    other = "w2-b128-e30-g0"
    run_id = dev.launch("snapshot", other)["run"]["runId"]
    line = dev.line(f"digits_chain {other} failed")
    assert f"digits/dataset was never materialized for {other}; materialize it first" in line
    assert line.endswith(f"{dev.ui}/runs/{run_id}")


def test_a_scale_that_is_unknown_is_one_error_in_the_launchpad_too(dev: Dev) -> None:
    dev.until(dev.serves_code, "the code is served")
    unknown = "w1-b128-e300-g0"
    run_id = dev.launch("dataset", unknown)["run"]["runId"]
    line = dev.line(f"digits_chain {unknown} failed")
    assert f"failed: digits has no scale {unknown}; it has {SCALE}, " in line
    assert "name a file with all scales that digits is to have in MLPIPES_SCALES" in line
    assert line.endswith(f"{dev.ui}/runs/{run_id}")


def test_code_that_died_is_told_in_one_line(dev: Dev) -> None:
    _, inner = dev.settled()
    inner.kill()
    dev.line("The code of mlpipes.definitions was not reachable any more; it is started again.")
    dev.until(lambda: dev.code_processes()[1].pid != inner.pid and dev.serves_code(), "the code is served again")
    assert not [line for line in dev.lines if "Traceback" in line]


def test_a_server_that_died_is_told_in_one_line(dev: Dev) -> None:
    proxy, _ = dev.settled()
    before = len(dev.lines)
    proxy.kill()
    dev.line("Dagster's code server was killed by SIGKILL; it was started again.")
    dev.until(lambda: dev.code_processes()[0].pid != proxy.pid and dev.serves_code(), "the code is served again")
    told = [line[9:] for line in dev.lines[before:]]
    assert told.count("Dagster's code server was killed by SIGKILL; it was started again.") == 1
    # A machine that needs long to start it may have it said, too, that the code is away meanwhile.
    assert len(told) == 1 or all("was not reachable any more" in line for line in told if "SIGKILL" not in line)


def test_another_session_on_the_same_home_is_refused(dev: Dev, sandbox: Sandbox) -> None:
    result = sandbox.run(f".venv/bin/mlpipes dev --port {free_port()}")
    assert result.returncode == 1
    assert f"another `mlpipes dev` serves {sandbox.home} already (Dagster UI: {dev.ui}" in result.stderr


def test_a_start_shows_all_if_asked_keeps_the_log_before_and_ends_quietly(elsewhere: Sandbox) -> None:
    log = elsewhere.home / "logs" / "dev.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("of an earlier start")
    made = Dev(elsewhere, "--verbose")
    try:
        made.ready()
        made.line("Started Dagster code server")
        assert log.with_name("dev.previous.log").read_text() == "of an earlier start"
        told = [line for line in made.lines if "No cursor for event type" not in line]  # on a new home
        assert not [line for line in told if "Traceback" in line or "WARNING" in line], made.lines
    finally:
        made.process.send_signal(signal.SIGINT)
        code = made.process.wait(LIMIT_SECONDS)
        end(made.process)
    assert code == 0
    assert "Ending Dagster's servers …" in made.lines
    assert not answers(f"{made.ui}/server_info")


def test_it_can_be_interrupted_while_it_starts(elsewhere: Sandbox) -> None:
    early = Dev(elsewhere)

    def code_servers() -> list[psutil.Process]:
        # Its first child may be any small program that a library asks.
        return [p for p in psutil.Process(early.process.pid).children() if "code-server" in command_of(p)]

    try:
        (server,) = early.until(code_servers, "a server was started")
        server.suspend()  # it does not come to listen, however long the signal takes
        early.process.send_signal(signal.SIGINT)
        early.line("^Ending Dagster's servers …$")
        with suppress(psutil.NoSuchProcess):  # on a busy machine, it may have been killed by then for not ending
            server.resume()
        code = early.process.wait(LIMIT_SECONDS)
    finally:
        end(early.process)
    assert code == 0
    assert early.lines[-1] == "Ending Dagster's servers …"
    assert "Dagster UI" not in "".join(early.lines)


def test_a_bad_scale_file_is_one_clear_error(elsewhere: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "scales.yaml"
    path.write_text("digits: [w3-b64-e1-g0]")
    result = elsewhere.run(f".venv/bin/mlpipes dev --port {free_port()}", MLPIPES_SCALES=str(path))
    assert result.returncode == 1
    said = result.stderr.splitlines()
    assert said[0].startswith("ConfigError: the definitions of mlpipes.definitions do not load. ")
    assert f"ScaleError: scale file {path}, workload digits, entry 1" in said[0]
    assert "batch_size 64 is not divisible by workers 3" in said[0]
    assert said[1:] == [f"More: {elsewhere.home}/logs/dev.log"]
    assert not [word for word in NOISE if word in result.stdout], result.stdout


def test_a_port_that_is_taken_is_said_before_anything_starts(elsewhere: Sandbox) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result: subprocess.CompletedProcess[str] = elsewhere.run(f".venv/bin/mlpipes dev --port {port}")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [f"ConfigError: port {port} is taken; choose another with --port"]
