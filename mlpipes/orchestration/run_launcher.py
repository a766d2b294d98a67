"""The run launcher: Dagster's own, which also notices that a run's process is gone."""

import time

import dagster as dg
import grpc
import psutil
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher.base import CheckRunHealthResult, WorkerStatus
from dagster._core.launcher.default_run_launcher import DefaultRunLauncher
from dagster._grpc.types import CanCancelExecutionRequest, CanCancelExecutionResult
from dagster._serdes import deserialize_value

GRACE_SECONDS = 8.0
"""After a start, code servers need a moment; a run declared dead too early may lose its retry (see `lost_retries`)."""
ANSWER_SECONDS = 10
"""How long one health check waits for a code server."""
BUSY_SECONDS = 600.0
"""How long a code server may fail to answer in time before its runs are taken for dead: a machine may be busy, or swap."""

EXECUTOR_TAG = "mlpipes/executor"
"""Tag of a run that no launcher has launched, because a program such as `mlpipes demo` executes it itself: which one."""


def this_process() -> str:
    """This process, as EXECUTOR_TAG says it: its number and its start, for numbers are used again."""
    return _named(psutil.Process())


def _named(process: psutil.Process) -> str:
    return f"{process.pid} {process.create_time()}"


def _health(executor: str) -> CheckRunHealthResult:
    """Whether the process that EXECUTOR_TAG names is alive."""
    try:
        process = psutil.Process(int(executor.partition(" ")[0]))
        if _named(process) == executor and process.status() != psutil.STATUS_ZOMBIE:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
    except psutil.Error:
        pass
    return CheckRunHealthResult(WorkerStatus.FAILED, "the program that executed the run is gone")


def _is_late(error: DagsterUserCodeUnreachableError) -> bool:
    """Whether a code server has not answered in time, as against not being there."""
    cause = error.__cause__
    return isinstance(cause, grpc.Call) and cause.code() == grpc.StatusCode.DEADLINE_EXCEEDED


class SupervisedRunLauncher(DefaultRunLauncher):
    """Dagster's own launcher with the health check that it lacks.

    Without one, a run whose process died together with the daemon stays STARTED for ever, and is never retried. The check
    asks the code server that launched the run whether it still owns it. (Dagster's launchers for Kubernetes have one;
    its base class is private, so this is the one place that touches private names.)
    """

    _first_check: float | None = None
    _answered = 0.0
    """When a code server answered for the last time, or was first asked."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        """True: run monitoring calls `check_run_worker_health`."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Whether the process of a run is alive."""
        if self._first_check is None:
            self._first_check = self._answered = time.monotonic()
        if time.monotonic() - self._first_check < GRACE_SECONDS:
            return CheckRunHealthResult(WorkerStatus.RUNNING, "the session has just started")
        client = self._get_grpc_client_for_termination(run.run_id)
        if client is None:  # a retry has its executor's tag, too, but was launched
            if executor := run.tags.get(EXECUTOR_TAG):
                return _health(executor)
            return CheckRunHealthResult(WorkerStatus.NOT_FOUND, "no code server is known that launched the run")
        try:
            answer = deserialize_value(
                client.can_cancel_execution(CanCancelExecutionRequest(run_id=run.run_id), timeout=ANSWER_SECONDS),
                CanCancelExecutionResult,
            )
        except DagsterUserCodeUnreachableError as error:
            if _is_late(error) and time.monotonic() - self._answered < BUSY_SECONDS:
                return CheckRunHealthResult(WorkerStatus.RUNNING, "its code server is too busy to answer")
            return CheckRunHealthResult(WorkerStatus.FAILED, "the code server that launched the run is gone")
        self._answered = time.monotonic()
        if not answer.can_cancel:
            return CheckRunHealthResult(WorkerStatus.FAILED, "its code server does not own the run any more")
        return CheckRunHealthResult(WorkerStatus.RUNNING)
