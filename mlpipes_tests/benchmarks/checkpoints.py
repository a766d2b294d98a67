"""Benchmark: what checkpoints cost, for the CIFAR-10 network and for one of BERT-base's size.

Run as `python -m mlpipes_tests.benchmarks.checkpoints`. Each save is timed whole: state to the CPU, files, checksums,
fsync, rename, pruning. From the seconds of one follows the share of the time at one per 5 s and one per 60 s.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from mlpipes.training.checkpoints import Checkpoints, Progress
from mlpipes.workloads.base import DataInfo
from mlpipes.workloads.image_classification import cifar10
from mlpipes.workloads.optimization import adamw

ROUNDS = 5


def stepped(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """The optimizers after a step, with all their state."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return optimizers


def main() -> None:
    """Print the table."""
    hp = cifar10.hyperparameters()
    facts = DataInfo({"class_names": list("0123456789")}, {"mean": [0.0] * 3, "std": [1.0] * 3})
    image = cifar10.build_model(hp, facts)
    # 110 million parameters in layers of BERT-base's shapes; what they compute does not matter here.
    large = nn.Sequential(nn.Embedding(30522, 768), *(nn.Linear(768, 3072) for _ in range(36)))
    progress = Progress(step=1, history=[["train/loss", 0.1, i, i] for i in range(1000)])
    print("| model | parameters | MiB | s a save (min–max) | CPU-s a save | at one per 5 s | at one per 60 s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, model, optimizers in (
        ("cifar10, Muon", image, list(cifar10.optimizers(image, hp))),
        ("BERT-base's size, AdamW", large, [adamw(large, 1e-4, 0.01)]),
    ):
        stepped(model, optimizers)
        walls, cpus, size = [], [], 0
        with tempfile.TemporaryDirectory(dir=os.environ.get("MLPIPES_BENCHMARK_DISK")) as folder:
            checkpoints = Checkpoints(Path(folder), keep_last=1)
            for step in range(1, ROUNDS + 1):
                progress.step = step
                wall, cpu = time.perf_counter(), time.process_time()
                checkpoints.save(model.state_dict(), optimizers, progress)
                walls.append(time.perf_counter() - wall)
                cpus.append(time.process_time() - cpu)
            size = checkpoints.load(ROUNDS).published.size
        wall = statistics.median(walls)
        print(
            f"| {name} | {sum(p.numel() for p in model.parameters()):,} | {size / 2**20:.0f} "
            f"| {wall:.3f} ({min(walls):.3f}–{max(walls):.3f}) | {statistics.median(cpus):.3f} "
            f"| {wall / (5 + wall):.1%} | {wall / (60 + wall):.2%} |"
        )
    print(f"\nMedian of {ROUNDS} saves; the next one is due that long after the last.")


if __name__ == "__main__":
    main()
