"""Supervision: noticing that a run's process is gone, and healing automatic retries that Dagster lost."""

import time
from collections.abc import Iterator, Sequence

import dagster as dg
from dagster import DagsterEventType
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher.base import CheckRunHealthResult, WorkerStatus
from dagster._core.launcher.default_run_launcher import DefaultRunLauncher
from dagster._grpc.types import CanCancelExecutionRequest, CanCancelExecutionResult
from dagster._serdes import deserialize_value

GRACE_SECONDS = 8.0
"""After a start, code servers need a moment; a run declared dead too early may lose its retry (see `lost_retries`)."""
_SETTLED_SECONDS = 20.0
_FORGOTTEN_SECONDS = 3600.0


class SupervisedRunLauncher(DefaultRunLauncher):
    """Dagster's own launcher with the health check that it lacks.

    Without one, a run whose process died together with the daemon stays STARTED for ever, and is never retried. The check
    asks the code server that launched the run whether it still owns it. (Dagster's launchers for Kubernetes have one;
    its base class is private, so this is the one place that touches private names.)
    """

    _first_check: float | None = None

    @property
    def supports_check_run_worker_health(self) -> bool:
        """True: run monitoring calls `check_run_worker_health`."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Whether the process of a run is alive."""
        if self._first_check is None:
            self._first_check = time.monotonic()
        if time.monotonic() - self._first_check < GRACE_SECONDS:
            return CheckRunHealthResult(WorkerStatus.RUNNING, "the session has just started")
        client = self._get_grpc_client_for_termination(run.run_id)
        if client is None:
            return CheckRunHealthResult(WorkerStatus.NOT_FOUND, "no code server is known that launched the run")
        try:
            answer = deserialize_value(
                client.can_cancel_execution(CanCancelExecutionRequest(run_id=run.run_id), timeout=10),
                CanCancelExecutionResult,
            )
        except DagsterUserCodeUnreachableError:
            return CheckRunHealthResult(WorkerStatus.FAILED, "the code server that launched the run is gone")
        if not answer.can_cancel:
            return CheckRunHealthResult(WorkerStatus.FAILED, "its code server does not own the run any more")
        return CheckRunHealthResult(WorkerStatus.RUNNING)


def lost_retries(workload: str) -> dg.SensorDefinition:
    """A sensor that launches a workload's automatic retries that Dagster promised and never made.

    Dagster may see a failure before the run's row says so, pass it over, and never look at it again; or try to launch the
    retry while the code server is away, and give up. Both were seen.
    """

    @dg.sensor(
        name=f"{workload}_lost_retries",
        target=dg.AssetSelection.groups(workload),
        minimum_interval_seconds=10,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=f"Launches automatic retries of {workload} that Dagster promised and never made.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
        found = 0
        failed = dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE], tags={"dagster/will_retry": ["true", "false"]})
        for record in context.instance.get_run_records(failed, limit=50):
            run, age = record.dagster_run, time.time() - (record.end_time or time.time())
            if age > _FORGOTTEN_SECONDS or "dagster/auto_retry_run_id" in run.tags:
                continue
            if context.instance.get_run_records(dg.RunsFilter(tags={"dagster/parent_run_id": run.run_id}), limit=1):
                continue
            # What Dagster gave up is lost for sure; of the rest, what it promised may still be on its way.
            promised = run.tags["dagster/will_retry"] == "true" and age >= _SETTLED_SECONDS
            if not promised and not _was_given_up(context.instance, run):
                continue
            planned = context.instance.get_records_for_run(
                run.run_id, of_type=DagsterEventType.ASSET_MATERIALIZATION_PLANNED
            )
            events = [record.event_log_entry.dagster_event for record in planned.records]
            assets = sorted({event.asset_key for event in events if event and event.asset_key})
            if assets and assets[0].path[0] == workload:
                found += 1
                yield retry_of(run, assets)
        if not found:
            yield dg.SkipReason("no retry was lost")

    return sensor


def _was_given_up(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Whether Dagster tried to launch a run's retry and could not, as against not wanting to."""
    logged = instance.all_logs(run.run_id, of_type=DagsterEventType.ENGINE_EVENT)
    return any("Failed to retry run" in (entry.message or "") for entry in logged)


def retry_of(run: dg.DagsterRun, assets: Sequence[dg.AssetKey]) -> dg.RunRequest:
    """The request that goes on where a run failed; its key makes it happen once."""
    own = {key: value for key, value in run.tags.items() if not key.startswith(("dagster/", ".dagster"))}
    kept = {key: run.tags[key] for key in ("dagster/partition", "dagster/backfill") if key in run.tags}
    return dg.RunRequest(
        run_key=f"retry-{run.run_id}",
        run_config=run.run_config,
        partition_key=run.tags.get("dagster/partition"),
        asset_selection=assets,
        tags={
            **own,
            **kept,
            "dagster/parent_run_id": run.run_id,
            "dagster/root_run_id": run.tags.get("dagster/root_run_id", run.run_id),
            "dagster/retry_number": str(int(run.tags.get("dagster/retry_number", "0")) + 1),
        },
    )
