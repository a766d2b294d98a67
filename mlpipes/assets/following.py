"""Following a training: its Ray job is submitted or found again, shown while it runs, and submitted again if it died."""

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from mlpipes.errors import TrainingFailedError
from mlpipes.store import Store, TrainingFolder
from mlpipes.training.recipe import Recipe
from mlpipes.training.specification import Checkpointing, Tracking, TrainingJob

if TYPE_CHECKING:
    from mlpipes.compute.address import RayAddress
    from mlpipes.compute.jobs import JobHandle, RayJobs

OBSERVATION_SECONDS = 5.0
MAX_JOBS = 5
"""Jobs that one step submits for a training that keeps dying without an error of its own."""


def follow_training(
    context: dg.AssetExecutionContext,
    address: "RayAddress",
    recipe: Recipe,
    store: Store,
    checkpointing: Checkpointing,
    tracking: Tracking,
) -> None:
    """Return when the result of a training is in the store.

    Raises TrainingFailedError if the training reports an error that a restart would not mend, was stopped, or died too
    often.
    """
    from mlpipes.compute.jobs import RayJobs

    jobs, folder, died = RayJobs(address), store.training(recipe.fingerprint), 0
    while True:
        handle = _attach_or_submit(jobs, folder, recipe, store, checkpointing, tracking, context.run.run_id)
        context.log.info(f"{'Attached to' if handle.attached else 'Submitted'} Ray job {handle.submission_id}")
        end = _watch(context, jobs, handle, folder)
        if folder.result.is_file():
            return
        if end.fatal:
            jobs.stop(handle.submission_id)
            raise TrainingFailedError(f"{end.error} (Ray job {handle.submission_id})")
        if end.status == "STOPPED":
            raise TrainingFailedError(
                f"Ray job {handle.submission_id} was stopped; materialize again to go on from there"
            )
        if (died := died + 1) == MAX_JOBS:
            log = "" if end.status == "LOST" else jobs.logs(handle.submission_id)[-3000:]
            raise TrainingFailedError(
                f"{MAX_JOBS} Ray jobs in a row died without a result. The last one's log ends:\n{log}"
            )
        context.log.warning(
            f"Ray job {handle.submission_id} ended as {end.status} without a result ({end.error or 'no error reported'}); "
            "going on from the last checkpoint"
        )


def _attach_or_submit(
    jobs: "RayJobs",
    folder: TrainingFolder,
    recipe: Recipe,
    store: Store,
    checkpointing: Checkpointing,
    tracking: Tracking,
    dagster_run: str,
) -> "JobHandle":
    def entrypoint(attempt: int) -> str:
        job = TrainingJob(
            recipe=recipe, store=str(store.root), attempt=attempt, checkpointing=checkpointing, tracking=tracking
        )
        python = sys.executable if jobs.address.local else "python"
        # exec: without it a shell stands between Ray and the driver, and the driver survives the head's death.
        return f"exec {shlex.join([python, '-m', 'mlpipes.training.job', str(job.write())])}"

    earlier = [int(path.stem[1:]) for path in folder.messages(0).parent.glob("a*.jsonl")]
    environment = {"MLPIPES_HOME": str(store.root.parent), "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONUNBUFFERED": "1"}
    if jobs.address.local:
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    return jobs.attach_or_submit(
        recipe.fingerprint,
        max(earlier, default=0) + 1,
        entrypoint,
        environment,
        metadata={"workload": recipe.workload, "scale": recipe.scale.key, "dagster_run_id": dagster_run},
    )


@dataclass
class _End:
    """How a job ended, as far as it was watched."""

    status: str = "RUNNING"
    error: str | None = None
    fatal: bool = False


def _watch(context: dg.AssetExecutionContext, jobs: "RayJobs", handle: "JobHandle", folder: TrainingFolder) -> _End:
    end, shown = _End(), 0.0
    try:
        for message in jobs.follow(handle, folder.messages(handle.attempt)):
            kind = message["kind"]
            if kind == "progress" and time.monotonic() - shown >= OBSERVATION_SECONDS:
                shown = time.monotonic()
                _observe(context, message)
            elif kind == "epoch":
                figures = ", ".join(f"{name} {value:.4f}" for name, value in message["metrics"].items())
                context.log.info(f"epoch {message['epoch']}/{message['epochs']}: validation {figures}")
            elif kind in ("started", "resumed"):
                context.log.info(f"{kind} at step {message['step']} of {message['total_steps']}")
            elif kind == "warning":
                context.log.warning(message["text"])
            elif kind == "failed":
                end.error, end.fatal = message["error"], message["fatal"]
                if end.fatal:
                    break
            elif kind == "finished" and folder.result.is_file():
                break  # the outcome is in the store; how long the driver takes to clean up does not matter
            elif kind == "ended":
                end.status = message["status"]
    except BaseException:
        # A cancelled run ends its training. Any other interruption (the code server goes away, say) leaves it running:
        # the next attempt attaches to it.
        run = context.instance.get_run_by_id(context.run.run_id)
        if run is not None and run.status in (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED):
            jobs.stop(handle.submission_id)
        raise
    return end


def _observe(context: dg.AssetExecutionContext, message: dict[str, Any]) -> None:
    context.log_event(
        dg.AssetObservation(
            context.asset_key,
            partition=context.partition_key,
            description=f"step {message['step']} of {message['total_steps']}",
            metadata={
                "epoch": message["epoch"],
                "loss": message["loss"],
                "samples_per_second": message["samples_per_second"],
                "eta_seconds": message["eta_seconds"],
            },
        )
    )
