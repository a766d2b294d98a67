"""The run launcher's health check."""

import json
import socket
import subprocess
from pathlib import Path

import dagster as dg
import psutil
import pytest
from dagster._core.launcher.base import WorkerStatus
from dagster._core.storage.tags import GRPC_INFO_TAG

from mlpipes.orchestration import run_launcher
from mlpipes.orchestration.instance import execute
from mlpipes.orchestration.run_launcher import EXECUTOR_TAG, SupervisedRunLauncher


def a_run(tags: dict[str, str]) -> dg.DagsterRun:
    return dg.DagsterRun(job_name="chain", run_id="r", tags=tags)


def test_a_worker_whose_code_server_is_gone_is_dead_after_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = SupervisedRunLauncher()
    run = a_run({})
    monkeypatch.setattr(launcher, "_get_grpc_client_for_termination", lambda run_id: None)
    clock = [100.0]
    monkeypatch.setattr(run_launcher.time, "monotonic", lambda: clock[0])
    assert launcher.supports_check_run_worker_health
    assert launcher.check_run_worker_health(run).status == WorkerStatus.RUNNING
    clock[0] += run_launcher.GRACE_SECONDS
    assert launcher.check_run_worker_health(run).status == WorkerStatus.NOT_FOUND


def test_a_code_server_that_is_busy_has_not_lost_its_runs_and_one_that_is_gone_has(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine under load, runs that went on were marked as failed."""
    monkeypatch.setattr(run_launcher, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(run_launcher, "ANSWER_SECONDS", 1)
    clock = [100.0]
    monkeypatch.setattr(run_launcher.time, "monotonic", lambda: clock[0])
    path = str(short / "code.sock")
    with dg.DagsterInstance.ephemeral() as instance, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()  # and never answers
        launcher = SupervisedRunLauncher()
        launcher.register_instance(instance)
        run = a_run({GRPC_INFO_TAG: json.dumps({"host": "localhost", "socket": path})}).with_status(
            dg.DagsterRunStatus.STARTED
        )
        instance.add_run(run)
        busy = launcher.check_run_worker_health(run)
        assert (busy.status, busy.msg) == (WorkerStatus.RUNNING, "its code server is too busy to answer")
        clock[0] += run_launcher.BUSY_SECONDS
        assert launcher.check_run_worker_health(run).status == WorkerStatus.FAILED, "nobody is busy for so long"
        clock[0] = 100.0
        listening.close()
        monkeypatch.setattr(run_launcher, "ANSWER_SECONDS", 300)  # nobody listens: told at once
        assert launcher.check_run_worker_health(run).status == WorkerStatus.FAILED


def test_a_run_that_a_program_executes_itself_lives_as_long_as_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mlpipes demo` beside `mlpipes dev`: its runs were marked as failed while they ran."""
    monkeypatch.setattr(run_launcher, "GRACE_SECONDS", 0.0)
    launcher = SupervisedRunLauncher()
    with subprocess.Popen(["sleep", "60"]) as program:
        process = psutil.Process(program.pid)
        executed = a_run({EXECUTOR_TAG: f"{process.pid} {process.create_time()}"})
        assert launcher.check_run_worker_health(executed).status == WorkerStatus.RUNNING
        another = a_run({EXECUTOR_TAG: f"{process.pid} {process.create_time() - 100}"})
        assert launcher.check_run_worker_health(another).status == WorkerStatus.FAILED, "the number is used again"
        program.kill()
    assert launcher.check_run_worker_health(executed).status == WorkerStatus.FAILED


def test_a_run_executed_in_this_process_says_so() -> None:
    @dg.job
    def chain() -> None: ...

    with dg.DagsterInstance.ephemeral() as instance:
        execute(chain, instance)
        (run,) = instance.get_runs()
        assert run.tags[EXECUTOR_TAG] == run_launcher.this_process()
