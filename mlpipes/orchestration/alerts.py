"""Alerts: one clear message when a run has failed for good: the cause, the last checkpoint, and how to go on."""

import os
from collections.abc import Sequence

import dagster as dg

from mlpipes.resources import StoreResource
from mlpipes.status import all_statuses
from mlpipes.store import Store

WEBHOOK_VARIABLE = "MLPIPES_WEBHOOK"
_PARTITION = "dagster/partition"


def failure_text(workload: str, partition: str | None, run_id: str, causes: Sequence[str], store: Store) -> str:
    """The message about a failed run; the last checkpoint is that of the scale's latest training."""
    from mlpipes.training.checkpoints import Checkpoints

    title = f"{workload} {partition or '(no partition)'} failed (Dagster run {run_id})."
    lines = [title, *(f"Cause: {cause}" for cause in causes or ["none was recorded; look at the run's log"])]
    statuses = (status for status in all_statuses(store) if (status.workload, status.scale) == (workload, partition))
    if (training := next(statuses, None)) is not None:
        steps = Checkpoints(training.folder.checkpoints).steps()
        if training.state == "finished":
            lines.append(f"The training {training.folder.fingerprint[:12]} had finished; nothing of it is lost.")
        elif steps:
            lines.append(f"Last checkpoint: step {steps[-1]} of training {training.folder.fingerprint[:12]}.")
        else:
            lines.append("There is no checkpoint yet.")
    if partition is not None:
        lines.append(f"To go on from there: mlpipes backfill {workload} --scale {partition}")
    return "\n".join(lines)


def send(text: str, address: str) -> None:
    """Post a message as JSON `{"text": …}`, which chat programs take. Raises requests.RequestException after 3 attempts."""
    import requests
    from tenacity import retry, stop_after_attempt, wait_random_exponential

    @retry(stop=stop_after_attempt(3), wait=wait_random_exponential(multiplier=0.5, max=5), reraise=True)
    def post() -> None:
        requests.post(address, json={"text": text}, timeout=10).raise_for_status()

    post()


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
    if address := os.environ.get(WEBHOOK_VARIABLE):
        try:
            send(text, address)
        except requests.RequestException as error:
            # The address may hold a token, and so may the error's text.
            context.log.error(f"the webhook did not take the message ({type(error).__name__})")
    return None
