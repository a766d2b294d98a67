"""Benchmark: what a checkpoint takes from a training, for the CIFAR-10 network and for one of BERT-base's size.

Run as `python -m mlpipes_tests.benchmarks.checkpoints`. Rounds of the same number of steps, about 5 s of them on one thread:
without a checkpoint, with one that the training waits for (as before there was a writer), and with one that is written
beside it. What a round takes longer than the one without is what the checkpoint cost; so the share of the time at one per
5 s is measured, and that at one per 60 s follows from it.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from mlpipes.training.checkpoint_writer import CheckpointWriter
from mlpipes.training.checkpoints import Checkpoints, Progress
from mlpipes.workloads.base import DataInfo
from mlpipes.workloads.image_classification import cifar10
from mlpipes.workloads.optimization import adamw
from mlpipes_tests.benchmarks.figures import record

ROUNDS = 6
ROUND_SECONDS = 5.0


def stepper(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], batch: Tensor) -> Callable[[], None]:
    """One step of a training."""

    def step() -> None:
        model(batch).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def seconds(work: Callable[[], None]) -> float:
    """Wall-clock seconds that something takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def measure(name: str, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], batch: Tensor) -> None:
    """Print a model's rows of the table."""
    step = stepper(model, optimizers, batch)
    step()
    steps = max(1, round(ROUND_SECONDS / statistics.median(seconds(step) for _ in range(5))))
    progress = Progress(step=1, history=[["train/loss", 0.1, i, i] for i in range(1000)])
    with tempfile.TemporaryDirectory(dir=os.environ.get("MLPIPES_BENCHMARK_DISK")) as folder:
        writer = CheckpointWriter(Checkpoints(Path(folder), keep_last=1), lambda _: None, nullcontext)

        def work(saves: bool, waits: bool) -> None:
            if saves:
                progress.step += 1
                writer.save(model.state_dict(), optimizers, progress)
            if waits:
                writer.wait()
            for _ in range(steps):
                step()

        paths = {"none": (False, False), "waited for": (True, True), "beside it": (True, False)}
        work(True, True)
        taken: dict[str, list[float]] = {path: [] for path in paths}
        for number in range(ROUNDS):
            for path in list(paths)[:: 1 if number % 2 else -1]:
                taken[path].append(seconds(lambda chosen=paths[path]: work(*chosen)))
                writer.wait()
        size = writer.checkpoints.load(progress.step).published.size
        writer.close()
    bare = statistics.median(taken["none"])
    parameters = sum(p.numel() for p in model.parameters())
    for path in ("waited for", "beside it"):
        lost = [with_one - without for with_one, without in zip(taken[path], taken["none"], strict=True)]
        cost = statistics.median(lost)
        record(f"{name}: time lost to a checkpoint {path}", "s", lost)
        print(
            f"| {name} | {parameters:,} | {size / 2**20:.0f} | {path} | {bare:.2f} ({steps}) "
            f"| {cost:.3f} ({min(lost):.3f}–{max(lost):.3f}) | {cost / bare:.1%} | {cost / 60:.2%} |",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    hp = cifar10.hyperparameters()
    facts = DataInfo({"class_names": list("0123456789")}, {"mean": [0.0] * 3, "std": [1.0] * 3, "shape": [3, 32, 32]})
    image = cifar10.build_model(hp, facts)
    # 110 million parameters in layers of BERT-base's shapes; what they compute does not matter here.
    layers = [nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768)) for _ in range(18)]
    large = nn.Sequential(nn.Embedding(30522, 768), *layers)
    print(
        "| model | parameters | MiB | the checkpoint is | s a round (steps) | s lost | at one a round | at one per 60 s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    measure("cifar10, Muon", image, list(cifar10.optimizers(image, hp)), torch.rand(128, 3, 32, 32))
    measure("BERT-base's size, AdamW", large, [adamw(large, 1e-4, 0.01)], torch.arange(512).reshape(4, 128))
    print(f"\nMedian (least–most) of {ROUNDS} rounds; one thread trains, {os.cpu_count()} cores.")


if __name__ == "__main__":
    main()
