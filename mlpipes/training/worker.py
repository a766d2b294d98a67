"""One worker's process: what Ray Train runs on every rank."""

import os
import threading
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from mlpipes.compute.imported import note
from mlpipes.data.snapshot import open_snapshot
from mlpipes.errors import UserError
from mlpipes.store.files import digest_of
from mlpipes.store.layout import Store
from mlpipes.store.lease import Lease
from mlpipes.store.messages import Failed, Finished, MessageWriter
from mlpipes.store.outcome import Outcome
from mlpipes.store.recipe import Recipe
from mlpipes.store.training_job import TrainingJob
from mlpipes.training.checkpoints import Checkpoints
from mlpipes.training.code_version import export_version
from mlpipes.training.determinism import environment, prepare_process
from mlpipes.training.disk_full import write_with_patience
from mlpipes.training.dry_run import DryRun, faults_named
from mlpipes.training.loop import Trainer
from mlpipes.training.parallel import DistributedWorkers, SingleWorker, Workers
from mlpipes.workloads.base import DataInfo
from mlpipes.workloads.catalog import load_workload
from mlpipes.workloads.entry import cause_of

RESULT_BYTES = 1 << 20
"""More than an outcome takes."""
FENCED = 3
"""Exit code of a worker whose training somebody else has taken over."""
_LOOK_SECONDS = 2.0


def train_on_ray(config: dict[str, Any]) -> None:
    """Ray Train's entry point: train with the process group that Ray has set up."""
    from ray.train.torch import get_device

    job = TrainingJob.read(Path(config["job"]))
    device = get_device()
    assert isinstance(device, torch.device)  # noqa: S101 - a list only if more than one GPU a worker is asked for
    if device.type == "cuda":
        torch.cuda.set_device(device)
    workers: Workers = DistributedWorkers() if torch.distributed.is_initialized() else SingleWorker()
    lease = Lease(job.folder.path / "lease.json", config["lease"])
    over = threading.Event()
    threading.Thread(target=end_when_fenced, args=(lease, over), daemon=True, name="lease").start()
    try:
        train(job, workers, device, lease)
    except Exception as error:
        if _another_worker_is_gone(error):
            raise  # Ray Train starts the workers again, and they resume from the last checkpoint
        # Ray Train would restart a worker that raises, and it would fail in the same way: say so and end instead.
        notify = MessageWriter(job.folder.messages(job.attempt))
        notify(Failed(error=explained(error), fatal=True, rank=workers.rank))
    finally:
        over.set()


def end_when_fenced(lease: Lease, over: threading.Event) -> None:
    """End this process within seconds of the lease's loss, whatever it is doing, until its training is over.

    It could not write any more, but it would compute until it tried, on devices that somebody else may wait for; and where
    its head is gone, nobody else would end it.
    """
    while not over.wait(_LOOK_SECONDS):
        if lease.is_lost():
            os._exit(FENCED)


def _another_worker_is_gone(error: Exception) -> bool:
    """Whether an error says that the connection to another worker broke; gloo has no exception type of its own."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "closed by peer"))
    )


def explained(error: Exception) -> str:
    """What a user is told of an error: a cause and a remedy where they are known, the traceback otherwise."""
    return known_cause(error) or f"{cause_of(error)}\n{traceback.format_exc(limit=-8)}"


def known_cause(error: Exception) -> str | None:
    """Cause and remedy of an error, where they are known."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"the GPU has not enough memory ({str(error).partition('. ')[0]}). Use a smaller batch size, more workers, or a "
            "smaller model; for texts, set `max_tokens`, the tokens that go through the model at once."
        )
    if (what := str(error).partition(" does not have a deterministic implementation"))[1]:
        return (
            f"{what[0]} has no deterministic kernel on this device. Build the model from other operations, or set the "
            "hyperparameter `deterministic: false`, with which an interrupted training may end in other bits."
        )
    if str(error).startswith("Expected more than 1 value per channel"):
        return (
            "batch normalisation got a single sample. It sees one part of a batch at a time: use a larger batch size, fewer "
            f"`logical_shards`, or a larger `micro_batch` that leaves no remainder of 1. ({error})"
        )
    return None


def _tried(recipe: Recipe, device: torch.device) -> str:
    """Digest of all that a dry run depends on: not the scale, nor the seed."""
    export, torchs = export_version(recipe.implementation), str(torch.__version__)
    asked = recipe.model_dump(mode="json", include={"implementation", "snapshot", "hyperparameters", "code"})
    return digest_of(asked | {"export": export, "device": device.type, "torch": torchs})


def train(job: TrainingJob, workers: Workers, device: torch.device, lease: Lease | None = None) -> None:
    """Train from the latest checkpoint to the end; rank 0 writes the result, as long as the lease is its driver's.

    Raises a UserError for what a restart would not mend.
    """
    if lease is not None:
        lease.check()  # Ray Train starts a fenced worker again; it is to say why it ends
    may_write = lease.guarded if lease is not None else nullcontext
    recipe = job.recipe
    notify = MessageWriter(job.folder.messages(job.attempt))
    workload = load_workload(recipe.implementation)
    hp = workload.hyperparameters.model_validate(recipe.hyperparameters)
    prepare_process(recipe.scale.threads, recipe.seed, hp.deterministic)
    snapshot = open_snapshot(job.snapshot)
    info, columns = DataInfo(snapshot.facts, snapshot.meta["statistics"], snapshot.files), snapshot.columns("train")
    checkpoints = Checkpoints(job.folder.checkpoints, job.checkpointing.keep_last)
    with faults_named(workload, recipe.workload, known_cause):
        trainer = Trainer(
            workload,
            hp,
            recipe.scale,
            info,
            columns,
            snapshot.columns("validation"),
            seed=recipe.seed,
            workers=workers,
            device=device,
            checkpoints=checkpoints,
            policy=job.checkpointing,
            notify=notify,
            may_write=may_write,
            stop_is_asked=job.folder.stop_request(job.attempt).exists,
        )
        if workers.rank == 0 and not checkpoints.steps():
            DryRun(trainer, info, columns).run_once(Store(Path(job.store)).dry_run(_tried(recipe, device)))
    trainer.resume()
    if workers.rank == 0:
        note()
    result = trainer.run()
    if workers.rank == 0:
        where = {"fingerprint": recipe.fingerprint, "attempt": job.attempt, "environment": environment(device)}
        outcome = Outcome(**dict(result), **where)

        def publish() -> None:
            with may_write():
                outcome.write_to(job.folder.result)

        write_with_patience(publish, job.folder.path, RESULT_BYTES, notify)
        notify(Finished(step=outcome.steps, total_steps=outcome.steps, best=outcome.best))
