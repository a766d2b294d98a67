"""Schedules: every scale that has a model is evaluated again, every night."""

from collections.abc import Iterator

import dagster as dg

from mlpipes.errors import ConfigError
from mlpipes.evaluation.records import NIGHT_TAG
from mlpipes.store.environment import value_of
from mlpipes.workloads.catalog import Entry

NIGHTLY_VARIABLE, ZONE_VARIABLE = "MLPIPES_NIGHTLY", "MLPIPES_NIGHTLY_TIMEZONE"
_TWO_IN_THE_MORNING = "0 2 * * *"


def night_of_environment() -> tuple[str | None, str]:
    """The cron expression in `$MLPIPES_NIGHTLY`, if there is one, and the time zone that it is meant in (default UTC).

    Raises ConfigError, naming the variable, for what is none.
    """
    cron, zone = value_of(NIGHTLY_VARIABLE), value_of(ZONE_VARIABLE) or "UTC"
    try:
        dg.ScheduleDefinition(name="night", job_name="night", cron_schedule=cron or _TWO_IN_THE_MORNING)
    except dg.DagsterInvalidDefinitionError as error:
        raise ConfigError(
            f"{NIGHTLY_VARIABLE}={cron} is no cron expression: write minute, hour, day, month and weekday, such as 0 2 * * *"
        ) from error
    return cron, zone


def nightly(entry: Entry) -> dg.ScheduleDefinition:
    """Evaluates every scale that has a model again, once a night; on if `$MLPIPES_NIGHTLY` holds a cron expression.

    Raises ConfigError if it, or the time zone, is none.
    """
    cron, zone = night_of_environment()

    @dg.schedule(
        name=f"{entry.name}_nightly",
        job_name=f"{entry.name}_evaluation",
        cron_schedule=cron or _TWO_IN_THE_MORNING,
        execution_timezone=zone,
        default_status=dg.DefaultScheduleStatus.RUNNING if cron else dg.DefaultScheduleStatus.STOPPED,
        description=f"Evaluates every scale of {entry.name} that has a model, at `{cron or _TWO_IN_THE_MORNING}` ({zone}).",
    )
    def schedule(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
        night = f"{context.scheduled_execution_time:%Y-%m-%d}"
        trained = context.instance.get_materialized_partitions(dg.AssetKey([entry.name, "model"]))
        keys = [scale.key for scale in entry.scales if scale.key in trained]
        # A schedule's run key holds for one tick only, and a night may have several: after a restart, or by a short cron.
        evaluated = {
            key
            for key in keys
            if context.instance.get_runs_count(dg.RunsFilter(tags={NIGHT_TAG: night, "dagster/partition": key}))
        }
        if not keys:
            yield dg.SkipReason(f"no scale of {entry.name} has a model yet")
        elif evaluated == set(keys):
            yield dg.SkipReason(f"every scale of {entry.name} with a model has been evaluated for the night of {night}")
        for key in keys:
            if key not in evaluated:
                yield dg.RunRequest(run_key=f"{entry.name}:{night}:{key}", partition_key=key, tags={NIGHT_TAG: night})

    return schedule
