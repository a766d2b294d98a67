"""Sensors: messages about failed runs, retries that Dagster lost, reports that follow evaluations, a tidy cluster."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from dagster import DagsterEventType

from mlpipes.errors import ConfigError, UserError
from mlpipes.orchestration.alerts import WEBHOOK_VARIABLE, failure_text, send
from mlpipes.orchestration.resources import StoreResource
from mlpipes.store.environment import value_of

if TYPE_CHECKING:
    from mlpipes.compute.kubernetes_tidy import Wanted

_PARTITION = "dagster/partition"
_UNFINISHED = [
    status
    for status in dg.DagsterRunStatus
    if status not in (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
]
_SETTLED_SECONDS = 20.0
_FORGOTTEN_SECONDS = 3600.0


@dg.run_failure_sensor(
    name="failure_message",
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=10,
    description=f"Says why a run failed for good; posts it to ${WEBHOOK_VARIABLE} where that is set.",
)
def failure_message(context: dg.RunFailureSensorContext, store: StoreResource) -> dg.SkipReason | None:
    """Log one message for each run that failed and will not be retried, and post it where a webhook is set."""
    import requests

    run = context.dagster_run
    if run.tags.get("dagster/will_retry") == "true":
        return dg.SkipReason(f"run {run.run_id} will be retried")
    causes = []
    for event in context.get_step_failure_events():
        error = event.step_failure_data.error
        # The error itself without the traceback; what the user can mend comes as a failure with a description.
        data = event.step_failure_data.user_failure_data
        causes.append(
            f"{event.step_key}: {(data and data.description) or (error and error.message.strip()) or 'unknown'}"
        )
    step_keys = [event.step_key for event in context.get_step_failure_events() if event.step_key]
    assets = sorted(key.path[0] for key in run.asset_selection or ())
    workload = assets[0] if assets else (step_keys[0].partition("__")[0] if step_keys else run.job_name)
    text = failure_text(
        workload, run.tags.get(_PARTITION), run.run_id, causes or [context.failure_event.message or ""], store.store
    )
    context.log.error(text)
    try:
        address = value_of(WEBHOOK_VARIABLE)
    except ConfigError as error:
        context.log.error(str(error))
        return None
    if address:
        try:
            send(text, address)
        except requests.RequestException as error:
            # The address may hold a token, and so may the error's text.
            context.log.error(f"the webhook did not take the message ({type(error).__name__})")
    return None


@dg.sensor(
    name="lost_retries",
    asset_selection=dg.AssetSelection.all(),
    minimum_interval_seconds=10,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Launches automatic retries that Dagster promised and never made.",
)
def lost_retries(context: dg.SensorEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """Request the automatic retries that Dagster promised and never made.

    Dagster may see a failure before the run's row says so, pass it over, and never look at it again; or try to launch the
    retry while the code server is away, and give up. Both were seen. One sensor for all workloads: each costs a look every
    ten seconds, for ever.
    """
    assert context.repository_def is not None  # noqa: S101 - the daemon evaluates sensors of a loaded code location
    here, found = context.repository_def.asset_graph, 0
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
        if assets and all(here.has(asset) for asset in assets):  # else of another code location, or of one of before
            found += 1
            yield retry_of(run, assets)
    if not found:
        yield dg.SkipReason("no retry was lost")


def _was_given_up(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Whether Dagster tried to launch a run's retry and could not, as against not wanting to."""
    logged = instance.all_logs(run.run_id, of_type=DagsterEventType.ENGINE_EVENT)
    return any("Failed to retry run" in (entry.message or "") for entry in logged)


def retry_of(run: dg.DagsterRun, assets: Sequence[dg.AssetKey]) -> dg.RunRequest:
    """The request that resumes where a run failed; its key makes it happen once."""
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
            # Of a run that was executed again by hand, the first one: a fresh training is known by it, and goes on.
            "dagster/root_run_id": run.tags.get("dagster/root_run_id") or run.root_run_id or run.run_id,
            "dagster/retry_number": str(int(run.tags.get("dagster/retry_number", "0")) + 1),
        },
    )


@dg.sensor(
    name="tidy_kubernetes",
    minimum_interval_seconds=10,  # so long a dead node may hold a training up that nobody follows
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Leaves nothing on the cluster of trainings that nobody follows any more.",
)
def tidy_kubernetes(context: dg.SensorEvaluationContext, store: StoreResource) -> dg.SkipReason:
    """Delete RayJobs that have ended or were cancelled and that no run follows, and pods that a dead node holds."""
    from mlpipes.compute.kubernetes_settings import SETTINGS_VARIABLE, KubernetesSettings
    from mlpipes.compute.kubernetes_tidy import tidy

    try:
        if not (path := value_of(SETTINGS_VARIABLE)):
            return dg.SkipReason(f"{SETTINGS_VARIABLE} is not set")
        done = list(tidy(KubernetesSettings.load(Path(path)), str(store.store.root), partial(wanted, context.instance)))
    except (UserError, ConnectionError) as error:
        return dg.SkipReason(str(error))
    return dg.SkipReason("; ".join(done) or "there was nothing to tidy")


def wanted(instance: dg.DagsterInstance, run_id: str) -> "Wanted":
    """Whether anybody wants what a run has asked for: that run, or one of its partition, which attaches to its training."""
    from mlpipes.compute.kubernetes_tidy import Wanted

    run = instance.get_run_by_id(run_id) if run_id else None
    if run is None:
        return Wanted.NO_MORE
    unfinished = dg.RunsFilter(statuses=_UNFINISHED, tags={_PARTITION: run.tags.get(_PARTITION, "")})
    if not run.is_finished or instance.get_run_records(unfinished, limit=1):
        return Wanted.FOLLOWED
    return Wanted.CANCELLED if run.status == dg.DagsterRunStatus.CANCELED else Wanted.NO_MORE


def reports_follow() -> dg.AutomationConditionSensorDefinition:
    """Makes each scaling report anew when an evaluation has changed and no run is in progress any more."""
    return dg.AutomationConditionSensorDefinition(
        "reports_follow",
        target=dg.AssetSelection.all(),
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=30,
    )
