"""Alerts: one clear message when a run has failed for good: the cause, the last checkpoint, and how to resume."""

from collections.abc import Sequence

from mlpipes.store.layout import Store
from mlpipes.store.redaction import redact
from mlpipes.store.status import all_statuses

WEBHOOK_VARIABLE = "MLPIPES_WEBHOOK"


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
        lines.append(f"To resume from there: mlpipes backfill {workload} --scale {partition}")
    return redact("\n".join(lines))


def send(text: str, address: str) -> None:
    """Post a message as JSON `{"text": …}`, which chat programs take. Raises requests.RequestException after 3 attempts."""
    import requests
    from tenacity import retry, stop_after_attempt, wait_random_exponential

    @retry(stop=stop_after_attempt(3), wait=wait_random_exponential(multiplier=0.5, max=5), reraise=True)
    def post() -> None:
        requests.post(address, json={"text": text}, timeout=10).raise_for_status()

    post()
