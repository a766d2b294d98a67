"""Runs the real worker code in processes of a gloo group, without Ray, and makes it crash where a test wants it to."""

import multiprocessing as mp
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlpipes.data.snapshot import Snapshot, snapshot_of
from mlpipes.scales import RayScaleConfig
from mlpipes.store.files import read_record
from mlpipes.store.layout import Store
from mlpipes.store.recipe import Recipe
from mlpipes.store.training_job import Checkpointing, TrainingJob
from mlpipes.training import shared_memory
from mlpipes.training.checkpoints import Checkpoints
from mlpipes.training.loop import Trainer
from mlpipes.training.parallel import DistributedWorkers, SingleWorker
from mlpipes.training.worker import train
from mlpipes.workloads.base import DataInfo
from mlpipes.workloads.catalog import load_workload
from mlpipes_tests.waiting import LIMIT_SECONDS

DIGITS = "mlpipes.workloads.image_classification:digits"
PRELOADED = [
    "mlpipes.training.worker",
    *(f"mlpipes.workloads.{name}_classification" for name in ("image", "text")),
    *("transformers.models.auto.modeling_auto", "transformers.models.bert.modeling_bert"),
]
"""What the server of worker processes imports once; set for all tests, because only the first wish of a session counts."""


def make_job(root: Path, scale: str, implementation: str = DIGITS, seed: int = 0, **options: Any) -> TrainingJob:
    """A job for a workload at a scale; `options` are hyperparameters and `every_steps`."""
    store, workload = Store(root), load_workload(implementation)
    every_steps = options.pop("every_steps", None)
    snapshot, _ = snapshot_of(store, workload.source.load().digest(), workload)
    recipe = Recipe(
        workload=implementation.rpartition(":")[2],
        implementation=implementation,
        snapshot=snapshot.digest,
        scale=RayScaleConfig.from_key(scale),
        hyperparameters=workload.hyperparameters.model_validate(options).model_dump(mode="json"),
        seed=seed,
        code="test",
    )
    return TrainingJob(
        recipe=recipe,
        store=str(root),
        attempt=1,
        checkpointing=Checkpointing(every_steps=every_steps, every_seconds=None),
    )


class Discarding(DistributedWorkers):
    """The error of the program that this one replaces: each worker trains on its own, and all but one are discarded.

    None makes memory to share.
    """

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor] * self.size

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.mul_(self.size)


def _crash_at(step: int) -> None:
    original = Trainer._step

    def crashing(self: Trainer) -> None:
        if self.progress.step == step:
            self.writer.wait()  # so that it is known where its successor begins
            os._exit(9)
        original(self)

    Trainer._step = crashing


def _crash_within(step: int) -> None:
    original = torch.save

    def torn(content: Any, path: Path) -> None:
        original(content, path)
        if f"step-{step:08d}" in path.as_posix():
            os.truncate(path, 100)
            os._exit(9)

    torch.save = torn


def worker_process(
    rank: int, size: int, meeting: str, job: str, crash: int | None, torn: bool, discard: bool, device: str
) -> None:
    """One rank's process."""
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=size)
    if crash is not None:
        (_crash_within if torn else _crash_at)(crash)
    if discard:
        shared_memory._created = lambda *_: -1
    train(TrainingJob.read(Path(job)), Discarding() if discard else DistributedWorkers(), torch.device(device))
    dist.barrier()
    dist.destroy_process_group()


def run(
    job: TrainingJob,
    workers: int | None = None,
    crash: int | None = None,
    torn: bool = False,
    discard: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Run a job with its scale's workers (or another number of them) in processes of their own; returns the outcome.

    On a GPU, all share it. With `crash`, every process ends without a word before that step, once its checkpoints
    are there, and {} is returned; if also `torn`, the only worker's ends while it writes the checkpoint of that step.
    """
    size = workers or job.recipe.scale.workers
    path, context = job.write(), mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # They meet in a file: a port that was free may be somebody else's by then.
    with tempfile.TemporaryDirectory() as folder:
        codes = _ended(
            [
                context.Process(
                    target=worker_process,
                    args=(rank, size, f"{folder}/meeting", str(path), crash, torn, discard, device),
                )
                for rank in range(size)
            ]
        )
    assert codes == [9 if crash is not None else 0] * size
    return {} if crash is not None else read_record(job.folder.result)


def _ended(processes: Sequence[Any]) -> list[int | None]:
    """Start processes and wait for their end; returns their exit codes."""
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(LIMIT_SECONDS)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def trainer_on(
    snapshot: Snapshot, workload: Any, hp: Any, scale: str, folder: Path, *, seed: int = 0, device: str = "cpu"
) -> Trainer:
    """A trainer of one worker on a snapshot, with its checkpoints in a folder; for benchmarks."""
    return Trainer(
        workload,
        hp,
        RayScaleConfig.from_key(scale),
        DataInfo(snapshot.facts, snapshot.meta["statistics"], snapshot.files),
        snapshot.columns("train"),
        snapshot.columns("validation"),
        seed=seed,
        workers=SingleWorker(),
        device=torch.device(device),
        checkpoints=Checkpoints(folder),
        policy=Checkpointing(),
        notify=lambda *_, **__: None,
    )


def run_here(job: TrainingJob, device: str = "cpu") -> dict[str, Any]:
    """Run a job with one worker in this process."""
    job.write()
    threads = torch.get_num_threads()
    try:
        train(job, SingleWorker(), torch.device(device))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    return read_record(job.folder.result)


def curve(outcome: dict[str, Any]) -> list[list[Any]]:
    """The history without its times."""
    return [row[:3] for row in outcome["history"]]
