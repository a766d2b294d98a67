"""Schedules: every scale that has a model is evaluated again, every night."""

import os
from collections.abc import Iterator

import dagster as dg

from mlpipes.evaluation.records import NIGHT_TAG
from mlpipes.workloads.catalog import Entry

NIGHTLY_VARIABLE = "MLPIPES_NIGHTLY"
_TWO_IN_THE_MORNING = "0 2 * * *"


def nightly(entry: Entry) -> dg.ScheduleDefinition:
    """Evaluates every scale that has a model again, once a night; on if `$MLPIPES_NIGHTLY` holds a cron expression."""
    cron = os.environ.get(NIGHTLY_VARIABLE)

    @dg.schedule(
        name=f"{entry.name}_nightly",
        job_name=f"{entry.name}_evaluation",
        cron_schedule=cron or _TWO_IN_THE_MORNING,
        default_status=dg.DefaultScheduleStatus.RUNNING if cron else dg.DefaultScheduleStatus.STOPPED,
        description=f"Evaluates every scale of {entry.name} that has a model, at `{cron or _TWO_IN_THE_MORNING}`.",
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
