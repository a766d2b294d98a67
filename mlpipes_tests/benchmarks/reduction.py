"""Benchmark: what a step costs with `reduction: ordered` (the same bits at any number of workers) and with `allreduce`.

Run as `python -m mlpipes_tests.benchmarks.reduction [WORKERS …]`. The network of `digits` with batches of 64 and an
untrained encoder of MiniLM's size (22.7 million parameters) with batches of 32 × 16 tokens are trained on random data, in
one process a worker over gloo. The two ways take turns step by step; medians of CPU-seconds over all workers, because the
machine may be shared, and their ratio are printed. Two workers then take turns with one of them alone, in seconds, with a
logical shard a worker and bf16 where the machine has it, as `sst2` is trained.
"""

import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from mlpipes.training.determinism import prepare_process, resolve_precision
from mlpipes.training.embedding import keep_embedding_gradients
from mlpipes.training.gradient import ShardedGradient
from mlpipes.training.parallel import DistributedWorkers, SingleWorker, Workers
from mlpipes.workloads.networks import digits_network
from mlpipes_tests.benchmarks.figures import record

SHARDS = 4
STEPS = {"digits": 200, "MiniLM's size": 15}
Step = Callable[[], None]


def digits() -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], int]:
    """Model, loss of some rows, batch size."""
    images, labels = torch.rand(1024, 1, 8, 8), torch.randint(10, (1024,))
    return (
        digits_network(1, 10, 32).to(memory_format=torch.channels_last),
        lambda model, rows: nn.functional.cross_entropy(model(images[rows]), labels[rows], reduction="sum"),
        64,
    )


def minilm() -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], int]:
    """Model, loss of some rows, batch size."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    ids, labels = torch.randint(30522, (1024, 16)), torch.randint(2, (1024,))

    def loss(model: Any, rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(input_ids=ids[rows]).logits, labels[rows], reduction="sum")

    return BertForSequenceClassification(config), loss, 32


MODELS = {"digits": digits, "MiniLM's size": minilm}


def step_of(name: str, workers: Workers, reduction: Any, shards: int = SHARDS, precision: str = "fp32") -> Step:
    """A training step of a model: gradient and optimizer."""
    torch.manual_seed(0)
    model, loss, batch_size = MODELS[name]()
    keep_embedding_gradients(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    gradient = ShardedGradient(model, workers, shards, reduction)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        rows = torch.randint(1024, (batch_size,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            gradient.compute(rows, lambda _, part: [(loss(model, part), len(part))])
        optimizer.step()

    return step


def measure(paths: dict[str, Step], steps: int, workers: Workers) -> dict[str, list[float]]:
    """CPU-seconds of each step over all workers, by path; the paths take turns."""
    found: dict[str, list[float]] = {path: [] for path in paths}
    for number in range(steps + 2):
        for path, step in paths.items():
            began = time.process_time()
            step()
            spent = torch.tensor(time.process_time() - began, dtype=torch.float64)
            total = float(sum(workers.gather(spent)))
            if number >= 2:
                found[path].append(total)
    return found


def speed_ups(name: str, workers: Workers, rounds: int) -> list[float]:
    """Of each round: how many times as fast a step is with all workers as with rank 0 alone, while the others wait."""
    precision = resolve_precision("auto", torch.device("cpu"))
    together = step_of(name, workers, "ordered", workers.size, precision)
    alone = step_of(name, SingleWorker(), "ordered", 1, precision) if workers.rank == 0 else lambda: None
    found = []
    for _ in range(rounds + 2):
        seconds = []
        for step in (alone, together):
            workers.gather(torch.zeros(1))
            began = time.perf_counter()
            step()
            workers.gather(torch.zeros(1))
            seconds.append(time.perf_counter() - began)
        found.append(seconds[0] / seconds[1])
    return found[2:]


def work(rank: int, size: int, port: int) -> None:
    """One worker."""
    prepare_process(1, 0)
    if size > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    workers = DistributedWorkers() if size > 1 else SingleWorker()
    for name, steps in STEPS.items():
        taken = measure({way: step_of(name, workers, way) for way in ("ordered", "allreduce")}, steps, workers)
        if rank == 0:
            for way, values in taken.items():
                record(f"{name}, {size} workers, {way}: a step", "CPU-s", values)
            found = {way: statistics.median(values) for way, values in taken.items()}
            figures = " | ".join(f"{seconds * 1e3:.1f}" for seconds in found.values())
            print(f"| {name} | {size} | {figures} | {found['ordered'] / found['allreduce']:.2f} |", flush=True)
        if size == 2:
            found = speed_ups(name, workers, STEPS[name] * 2)
            if rank == 0:
                record(f"{name}: times as fast with 2 workers as with one", "ratio", found)
                print(
                    f"| {name} | {size} | times as fast as one worker | | {statistics.median(found):.2f} |", flush=True
                )
    if size > 1:
        dist.destroy_process_group()


def main() -> None:
    """Print the table."""
    print(
        "| model | workers | ordered, CPU-ms | allreduce, CPU-ms | ratio |\n| --- | --- | --- | --- | --- |", flush=True
    )
    for size in [int(argument) for argument in sys.argv[1:]] or [1, 2, 4]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(work, args=(size, port), nprocs=size)


if __name__ == "__main__":
    main()
