"""Waiting for a slot of a pool, asleep: in Dagster's own executor, each run that waits takes a core until it has one."""

from time import sleep, time

from dagster._core.errors import raise_execution_interrupts
from dagster._core.execution.plan import instance_concurrency_context as claims_of_runs
from dagster._core.execution.plan.active import ActiveExecution

_LONGEST_SECONDS = 2.0
"""Between two claims. Dagster's own are ever further apart, up to 15 s, in which a free slot may wait for a waiting run."""


def _sleep_til_ready(self: ActiveExecution) -> None:
    moments, claims = list(self._waiting_to_retry.values()), self._instance_concurrency_context
    if claims is not None and claims.has_pending_claims():
        moments += claims._pending_timeouts.values()
    now = time()
    with raise_execution_interrupts():
        sleep(max(0.0, min(moments, default=now) - now))


def sleep_while_waiting() -> None:
    """Have executions in this process do so.

    Dagster 1.13 takes the lesser of nothing and the time until the next claim, which is none, and looks for interruptions in
    steps only.
    """
    ActiveExecution.sleep_til_ready = _sleep_til_ready
    claims_of_runs.MAX_CONCURRENCY_CLAIM_BLOCKED_INTERVAL = _LONGEST_SECONDS
