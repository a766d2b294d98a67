"""Following a training: its job is submitted or found again, shown while it runs, and submitted again if it died."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dagster as dg

from mlpipes.compute.jobs import JobHandle, Jobs, ask_for_last_checkpoint
from mlpipes.errors import TrainingFailedError
from mlpipes.orchestration.live import LiveView
from mlpipes.store.layout import TrainingFolder
from mlpipes.store.training_job import TrainingJob

DEAD, STALLED = "DEAD", "STALLED"
DEAD_SECONDS = 30.0
"""A driver whose heartbeat stood still for so long is dead, whatever the Jobs API says (it may say RUNNING for long)."""
FAREWELL_SECONDS = 20.0
"""What a cancelled training gets for its last checkpoint at most: a large model on a slow disk needs some seconds, and run
monitoring gives a cancelled run a minute."""
MAX_JOBS = 5
"""Jobs that one step submits for a training that keeps dying without an error of its own and gets no further."""


def follow_training(
    context: dg.AssetExecutionContext,
    connect: Callable[[], Jobs],
    job: TrainingJob,
    stall_seconds: float,
    links: Mapping[str, Any],
) -> None:
    """Return when the result of a training is in the store; `job` is its first attempt, later ones differ in number.

    `links` (one is `mlflow`) are shown with the training's progress. A training that reports nothing for `stall_seconds` is
    ended, its workers' stacks kept, and started again from its last checkpoint. Raises TrainingFailedError if the training
    reports an error that a restart would not mend, was stopped, or died too often.
    """
    folder, restarts, view = job.folder, _Restarts(job.folder), LiveView(context, job, links)
    while True:
        jobs, log, cause, status = connect(), "", "", "LOST"
        try:
            handle = jobs.attach_or_submit(job)
            context.log.info(f"{'Attached to' if handle.attached else 'Submitted'} {jobs.name} {handle.id}")
            end = _watch(context, jobs, handle, folder, stall_seconds, view, restarts)
            if folder.result.is_file():
                _see_off(context, jobs, end.handle)
            else:
                log = _settle(context, jobs, folder, end)
            status, cause = end.status, end.error or "no error reported"
        except ConnectionError as error:
            # The head is gone for longer than its clients are patient. A private one is started again by `connect`.
            cause = str(error)
        if folder.result.is_file():
            return
        if restarts.are_in_vain():
            raise TrainingFailedError(f"{restarts} ({cause}):\n{log}")
        context.log.warning(
            f"The {jobs.name} ended as {status} without a result ({cause}); going on from the last checkpoint"
        )


def _see_off(context: dg.AssetExecutionContext, jobs: Jobs, handle: JobHandle) -> None:
    """Let the driver of a finished training end, so that its last metrics are sent; a driver that hangs is ended."""
    deadline = time.monotonic() + DEAD_SECONDS
    while (status := jobs.status(handle)).state in ("PENDING", "RUNNING", "REQUEUED"):
        if status.state == "REQUEUED":
            handle = replace(handle, attempt=status.attempt)
        elif status.state == "PENDING" or time.monotonic() > deadline:
            context.log.warning(f"{jobs.name} {handle.id} is {status.state} although its training is done; ending it")
            jobs.stop(handle)
            return
        time.sleep(0.2)


def _settle(context: dg.AssetExecutionContext, jobs: Jobs, folder: TrainingFolder, end: "_End") -> str:
    """Deal with a job that ended without a result; returns the end of its log. Raises TrainingFailedError if it is final."""
    from mlpipes.compute.stacks import keep_stacks

    handle = end.handle
    if end.status == STALLED:
        stacks = keep_stacks(folder.fingerprint, folder.path / "jobs" / f"a{handle.attempt}.stacks.txt")
        context.log.warning(f"Stacks of the stalled processes on this machine: {stacks}")
    if end.status == "REFUSED":
        end.error, end.fatal = f"it waits and can never start, because of {end.error}; see `mlpipes doctor slurm`", True
    if end.fatal or end.status in (DEAD, STALLED):
        jobs.stop(handle)
    if end.fatal:
        raise TrainingFailedError(f"{end.error} ({jobs.name} {handle.id})")
    if end.status == "STOPPED":
        raise TrainingFailedError(f"{jobs.name} {handle.id} was stopped; materialize again to go on from there")
    return "" if end.status == "LOST" else jobs.logs(handle, folder)[-3000:]


@dataclass
class _End:
    """How a job ended, as far as it was watched."""

    handle: JobHandle
    """The attempt that it had come to; a job that is put back into its queue begins another."""
    status: str = "RUNNING"
    error: str | None = None
    fatal: bool = False


def _watch(
    context: dg.AssetExecutionContext,
    jobs: Jobs,
    handle: JobHandle,
    folder: TrainingFolder,
    stall_seconds: float,
    view: LiveView,
    restarts: "_Restarts",
) -> _End:
    end = _End(handle)
    # Signs of life are compared with our own monotonic clock: wall clocks jump, and those of two machines differ.
    beat, beat_seen, heard, why = None, time.monotonic(), time.monotonic(), ""
    try:
        for message in jobs.follow(handle, folder):
            kind, now = message["kind"], time.monotonic()
            if kind == "waiting":
                if message["status"] == "PENDING":
                    beat_seen = heard = now
                    if message["reason"] not in (why, "None"):
                        why = message["reason"]
                        context.log.info(f"{jobs.name} {handle.id} waits: {why}")
                    if folder.result.is_file():  # by an earlier attempt, on a node that was given up too soon
                        break
                if (current := _modified(folder.heartbeat(handle.attempt))) != beat:
                    beat, beat_seen = current, now
                if beat is not None and now - beat_seen > DEAD_SECONDS:
                    return _End(handle, DEAD, f"its driver gave no sign of life for {DEAD_SECONDS:.0f} s")
                if now - heard > stall_seconds:
                    return _End(handle, STALLED, f"it reported nothing for {stall_seconds:.0f} s")
                view.show(message)
                continue
            heard = now
            view.show(message)
            if kind == "epoch":
                figures = ", ".join(f"{name} {value:.4f}" for name, value in message["metrics"].items())
                context.log.info(f"epoch {message['epoch']}/{message['epochs']}: validation {figures}")
            elif kind == "started":
                where = f"step {message['step']} of {message['total_steps']}"
                context.log.info(f"trains from {where} with {message['workers']} workers in {message['precision']}")
            elif kind == "warning":
                context.log.warning(message["text"])
            elif kind == "allocated":
                context.log.info(f"{jobs.name} {handle.id} has its allocation: {message['nodes']}")
            elif kind == "requeued":
                handle, beat = replace(handle, attempt=message["attempt"]), None
                end = _End(handle)
                if restarts.are_in_vain():
                    return _End(handle, error=f"{restarts}; is the time limit of a job too short?", fatal=True)
                context.log.info(f"{jobs.name} {handle.id} is back in its queue, for attempt {handle.attempt}")
            elif kind == "failed":
                end.error, end.fatal = message["error"], message["fatal"]
                if end.fatal:
                    break
            elif kind == "finished" and folder.result.is_file():
                break
            elif kind == "ended":
                end.status, end.error = message["status"], end.error or message["reason"]
    except BaseException:
        # A cancelled run ends its training. Any other interruption (the code server goes away, say) leaves it running:
        # the next attempt attaches to it.
        if is_cancelled(context):
            ask_for_last_checkpoint(folder, handle.attempt, FAREWELL_SECONDS)
            jobs.stop(handle)
        raise
    return end


def is_cancelled(context: dg.AssetExecutionContext) -> bool:
    """Whether somebody asked for this run to end, as against its process being interrupted."""
    run = context.instance.get_run_by_id(context.run.run_id)
    return run is not None and run.status in (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)


class _Restarts:
    """Counts the restarts of a training that brought no new checkpoint."""

    def __init__(self, folder: TrainingFolder) -> None:
        self.folder, self.step, self.count = folder, -1, 0

    def __str__(self) -> str:
        return f"{self.count} jobs in a row ended without a result and got no further than step {self.step}"

    def are_in_vain(self) -> bool:
        """Note one more; whether there were too many."""
        from mlpipes.training.checkpoints import Checkpoints  # not before: it imports torch

        reached = max(Checkpoints(self.folder.checkpoints).steps(), default=0)
        self.step, self.count = (reached, 1) if reached > self.step else (self.step, self.count + 1)
        return self.count >= MAX_JOBS


def _modified(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
