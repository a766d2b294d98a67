"""Following a training: its job is submitted or found again, shown while it runs, and submitted again if it died."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import dagster as dg

from mlpipes.compute.jobs import (
    Ended,
    JobHandle,
    Jobs,
    JobState,
    JobStatus,
    Requeued,
    Waiting,
    ask_for_last_checkpoint,
)
from mlpipes.errors import TrainingFailedError
from mlpipes.orchestration.live import LiveView
from mlpipes.store.heartbeat import DEAD_SECONDS, Pulse
from mlpipes.store.layout import TrainingFolder
from mlpipes.store.messages import (
    Allocated,
    EpochEnded,
    Failed,
    Finished,
    MessageWriter,
    Started,
    Waits,
    Warned,
    read_messages,
)
from mlpipes.store.redaction import redact
from mlpipes.store.training_job import TrainingJob, forget_handovers

FAREWELL_SECONDS = 20.0
"""What a cancelled training gets for its last checkpoint at most: a large model on a slow disk needs some seconds, and run
monitoring gives a cancelled run a minute."""
STOP_SECONDS = 25.0
"""What the job of a cancelled training gets to end, within that minute."""
END_SECONDS = 180.0
"""What a job whose result is in the store gets to end: a loaded machine needs a minute to send metrics and to stop Ray."""
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
        jobs, log, cause, status = connect(), "", "", JobState.LOST
        try:
            handle = jobs.attach_or_submit(job)
            context.log.info(f"{'Attached to' if handle.attached else 'Submitted'} {jobs.name} {handle.id}")
            end = _watch(context, jobs, handle, folder, stall_seconds, view, restarts)
            if folder.result.is_file():
                _see_off(context, jobs, end.handle, folder)
            else:
                log = _settle(context, jobs, folder, end)
            status, cause = end.status, end.error or "no error reported"
        except ConnectionError as error:
            # The head is gone for longer than its clients are patient. A private one is started again by `connect`.
            cause = redact(str(error))
        if folder.result.is_file():
            return
        if restarts.are_in_vain():
            raise TrainingFailedError(f"{restarts} ({cause}):\n{log}")
        context.log.warning(
            f"The {jobs.name} ended as {status} without a result ({cause}); resuming from the last checkpoint"
        )


def _see_off(context: dg.AssetExecutionContext, jobs: Jobs, handle: JobHandle, folder: TrainingFolder) -> None:
    """Let the driver of a finished training end, so that its last metrics are sent; a driver that hangs is ended."""
    deadline = time.monotonic() + END_SECONDS
    while (status := jobs.status(handle)).state in (JobState.PENDING, JobState.RUNNING, JobState.REQUEUED):
        if status.state == JobState.REQUEUED:
            handle = replace(handle, attempt=status.attempt)
        elif status.state == JobState.PENDING or time.monotonic() > deadline:
            context.log.warning(f"{jobs.name} {handle.id} is {status.state} although its training is done; ending it")
            jobs.stop(handle)
            return
        time.sleep(0.2)
    jobs.forget(handle, folder)


def _settle(context: dg.AssetExecutionContext, jobs: Jobs, folder: TrainingFolder, end: "_End") -> str:
    """Deal with a job that ended without a result; returns the end of its log. Raises TrainingFailedError if it is final."""
    handle = end.handle
    if end.status == JobState.STALLED:
        context.log.warning(f"Stacks {jobs.stacks(handle, folder)}")
    if end.status == JobState.REFUSED:
        end.error, end.fatal = f"it waits and can never start, because of {end.error}; see `{jobs.doctor}`", True
    if end.fatal or end.status in (JobState.DEAD, JobState.STALLED):
        jobs.stop(handle)
    else:
        jobs.forget(handle, folder)
    if end.fatal or end.status == JobState.STOPPED:
        forget_handovers(folder)
    if end.fatal:
        raise TrainingFailedError(f"{end.error} ({jobs.name} {handle.id})")
    if end.status == JobState.STOPPED:
        raise TrainingFailedError(f"{jobs.name} {handle.id} was stopped; materialize again to resume it")
    return "" if end.status == JobState.LOST else redact(jobs.logs(handle, folder)[-3000:])


@dataclass
class _End:
    """How a job ended, as far as it was watched."""

    handle: JobHandle
    """The attempt that it had come to; a job that is put back into its queue begins another."""
    status: JobState = JobState.RUNNING
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
    pulse, heard, why = Pulse(folder.heartbeat(handle.attempt)), time.monotonic(), ""
    try:
        for event in jobs.follow(handle, folder):
            now = time.monotonic()
            if not isinstance(event, Requeued | Ended):
                view.show(event)
            if not isinstance(event, Waiting):
                heard = now
            match event:
                case Waiting(status):
                    if status.reason not in (why, "None"):
                        why = status.reason
                        _tell(context, jobs, handle, folder, status)
                    if status.state == JobState.PENDING:
                        heard = now
                        if folder.result.is_file():  # by an earlier attempt, on a node that was given up too soon
                            break
                    if pulse.silence(waits=status.state == JobState.PENDING) > DEAD_SECONDS:
                        return _End(handle, JobState.DEAD, f"its driver gave no sign of life for {DEAD_SECONDS:.0f} s")
                    if now - heard > stall_seconds:
                        return _End(handle, JobState.STALLED, f"it reported nothing for {stall_seconds:.0f} s")
                case EpochEnded():
                    figures = ", ".join(f"{name} {value:.4f}" for name, value in event.metrics.items())
                    context.log.info(f"epoch {event.epoch}/{event.epochs}: validation {figures}")
                case Started():
                    where = f"step {event.step} of {event.total_steps}"
                    context.log.info(f"trains from {where} with {event.workers} workers in {event.precision}")
                case Warned():
                    context.log.warning(event.text)
                case Allocated():
                    context.log.info(f"{jobs.name} {handle.id} has its allocation: {event.nodes}")
                case Requeued():
                    handle = replace(handle, attempt=event.attempt)
                    pulse = Pulse(folder.heartbeat(handle.attempt))
                    end = _End(handle)
                    if restarts.are_in_vain():
                        return _End(handle, error=f"{restarts}; is the time limit of a job too short?", fatal=True)
                    context.log.info(f"{jobs.name} {handle.id} is back in its queue, for attempt {handle.attempt}")
                case Failed():
                    end.error, end.fatal = event.error, event.fatal
                    if end.fatal:
                        break
                case Finished() if folder.result.is_file():
                    break
                case Ended(status):
                    end.status, end.error = status.state, end.error or redact(status.reason)
                case _:
                    pass
    except BaseException:
        # A cancelled run ends its training. Any other interruption (the code server goes away, say) leaves it running:
        # the next attempt attaches to it.
        if is_cancelled(context):
            ask_for_last_checkpoint(folder, handle.attempt, FAREWELL_SECONDS)
            try:
                jobs.stop(handle, STOP_SECONDS)
            except ConnectionError as error:
                context.log.warning(f"{error}. Look at it when the cluster answers again")
            _note(folder, handle.attempt, "")
        raise
    return end


def _tell(
    context: dg.AssetExecutionContext, jobs: Jobs, handle: JobHandle, folder: TrainingFolder, status: JobStatus
) -> None:
    """Have people know why a job waits, or what is wrong with one that runs: in the run's log, and in the store."""
    reason = redact(status.reason)
    if status.state == JobState.PENDING:
        context.log.info(f"{jobs.name} {handle.id} waits: {reason}")
        _note(folder, handle.attempt, reason)
        return
    _note(folder, handle.attempt, "")
    if reason:
        context.log.warning(f"{jobs.name} {handle.id}: {reason}")


def _note(folder: TrainingFolder, attempt: int, reason: str) -> None:
    """Note in the store why an attempt waits, for whoever asks it how trainings stand; empty when it does not any more."""
    messages = MessageWriter(folder.messages(attempt))
    told = [message for message in read_messages(messages.path)[0] if isinstance(message, Waits)]
    if reason or (told and told[-1].reason):
        messages(Waits(reason=reason))


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
