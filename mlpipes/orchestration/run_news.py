"""News of Dagster's runs: one line when a run starts, is tried again, succeeds, fails or is cancelled."""

from datetime import UTC, datetime, timedelta

import dagster as dg
from dagster import DagsterEventType

from mlpipes.store.redaction import redact

_OVERLAP = timedelta(seconds=10)
"""So far back is looked again: rows become visible a little after the moment that they are stamped with."""
_CHARACTERS = 300
_TOLD = (
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.SUCCESS,
    dg.DagsterRunStatus.FAILURE,
    dg.DagsterRunStatus.CANCELED,
)


class RunNews:
    """What has happened to the runs of an instance since the last look."""

    def __init__(self, instance: dg.DagsterInstance, ui: str) -> None:
        """What is there already is no news. `ui` is the address of the Dagster UI, for links."""
        self._instance, self._ui = instance, ui
        self._told: dict[str, dg.DagsterRunStatus] = {}
        self._since = datetime.now(UTC)
        under_way = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
        for record in [*self._updated(), *instance.get_run_records(dg.RunsFilter(statuses=under_way))]:
            self._told[record.dagster_run.run_id] = record.dagster_run.status

    def lines(self) -> list[str]:
        """One line for each run whose status has changed, in the order of the changes; none if the instance is away."""
        try:
            changed = [
                record
                for record in self._updated()
                if record.dagster_run.status in _TOLD
                and self._told.get(record.dagster_run.run_id) != record.dagster_run.status
            ]
            lines = [self._line(record) for record in changed]
        except (
            Exception
        ):  # of any storage, for whatever reason: these lines are for display, and nothing may end for them
            return []
        self._told |= {record.dagster_run.run_id: record.dagster_run.status for record in changed}
        return lines

    def _updated(self) -> list[dg.RunRecord]:
        since = dg.RunsFilter(updated_after=self._since - _OVERLAP)
        records = self._instance.get_run_records(since, order_by="update_timestamp", ascending=True)
        if records:
            self._since = max(self._since, records[-1].update_timestamp)
        return list(records)

    def _line(self, record: dg.RunRecord) -> str:
        run, number = record.dagster_run, int(record.dagster_run.tags.get("dagster/retry_number", 0))
        name, link = name_of(run), f": {self._ui}/runs/{run.run_id}"
        match run.status:
            case dg.DagsterRunStatus.STARTED:
                again = f" again (retry {number})" if number else ""
                return f"{name} started{again}{link}"
            case dg.DagsterRunStatus.SUCCESS:
                seconds = (record.end_time or 0) - (record.start_time or record.end_time or 0)
                # With the link, if it was over before it could be said that it had started.
                return f"{name} succeeded after {seconds:.0f} s{'' if run.run_id in self._told else link}"
            case dg.DagsterRunStatus.CANCELED:
                return f"{name} was cancelled"
        retried = "; it is tried again" if run.tags.get("dagster/will_retry") == "true" else ""
        return f"{name} failed: {self._cause(run.run_id)}{retried}{link}"

    def _cause(self, run_id: str) -> str:
        kinds = {DagsterEventType.STEP_FAILURE, DagsterEventType.RUN_FAILURE}
        for found in self._instance.get_records_for_run(run_id, of_type=kinds, limit=1).records:
            event, text = found.event_log_entry.dagster_event, found.event_log_entry.message
            if event is not None and event.event_type == DagsterEventType.STEP_FAILURE:
                data = event.step_failure_data
                described = data.user_failure_data.description if data.user_failure_data else None
                error = data.error.cause or data.error if data.error else None
                text = described or (error.message if error else text)
            elif event is not None:
                text = event.message or text
            return redact(" ".join(text.split()))[:_CHARACTERS].rstrip(".")
        return "no cause is recorded"


def name_of(run: dg.DagsterRun) -> str:
    """A run for people: its job, or the assets that it makes, and the partition."""
    name = run.job_name
    if name.startswith("__"):  # the job that Dagster makes up for assets chosen in the UI, or by a backfill
        keys = sorted(key.to_user_string() for key in run.asset_selection or ())
        groups = sorted({key.partition("/")[0] for key in keys})
        name = f"{', '.join(groups)} ({len(keys)} assets)" if keys else "checks"
        name = keys[0] if len(keys) == 1 else name
    return f"{name} {run.tags.get('dagster/partition', '')}".rstrip()
