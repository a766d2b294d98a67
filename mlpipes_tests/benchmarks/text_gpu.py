"""Benchmark: tokens per second of an encoder of BERT-base's size on a GPU, in bf16, with and without torch.compile.

Run as `python -m mlpipes_tests.benchmarks.text_gpu`, on a machine with a GPU. The whole training step is measured (feed,
forward, backward, clipping, AdamW) on paragraphs of documentation, of which the embedded workload is made, so nothing needs
to be there. The share of peak counts what the model has to compute for real tokens, 6 operations per weight and token and
those of attention (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), so padding lowers it. `--check` runs a tiny encoder
for some steps on whatever there is, to see that this script works.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mlpipes.data.docstrings import DocstringSource
from mlpipes.data.snapshot import Snapshot, snapshot_of
from mlpipes.data.splits import SplitPlan
from mlpipes.store.layout import Store
from mlpipes.training.determinism import prepare_process, weights_digest
from mlpipes.workloads.encoders import Tiny
from mlpipes.workloads.text_classification import TextClassification, TextHyperparameters
from mlpipes_tests.training.harness import trainer_on

ROUNDS, MAX_LENGTH = 5, 128
BASE = Tiny(vocabulary=30522, hidden=768, layers=12, heads=12, intermediate=3072, positions=512)
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Operations per second of dense bf16, from the makers' data sheets (SXM modules where there are several)."""


class Contender:
    """One way to train, ready to be measured."""

    def __init__(
        self, workload: TextClassification, snapshot: Snapshot, batch: int, folder: Path, compiled: bool
    ) -> None:
        self.batch, self.workload = batch, workload
        self.lengths = torch.from_numpy(snapshot.columns("train")["tokens"].lengths)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.trainer = trainer_on(
            snapshot,
            workload,
            TextHyperparameters(logical_shards=1),
            f"w1-b{batch}-e99-g0",
            folder,
            device=self.device.type,
        )
        if compiled:
            self.trainer.model.compile(dynamic=True)

    def measure(self, steps: int) -> tuple[float, float, float]:
        """Tokens and padded tokens per second, and operations per second that real tokens need."""
        order, begun = self.trainer.order, self.trainer.progress.step
        self._wait()
        began = time.perf_counter()
        for _ in range(steps):
            self.trainer._step()
        self._wait()
        seconds = time.perf_counter() - began
        tokens = padded = operations = 0.0
        for step in range(begun, begun + steps):
            lengths = self.lengths[order.batch(*divmod(step, order.steps_per_epoch))].double()
            tokens += float(lengths.sum())
            padded += float(lengths.max() * len(lengths))
            operations += self._operations(lengths)
        return tokens / seconds, padded / seconds, operations / seconds

    def _operations(self, lengths: torch.Tensor) -> float:
        """6 per weight that a token meets, and 12 times width times length a layer for attention."""
        model: Any = self.trainer.model
        layers, width = model.config.num_hidden_layers, model.config.hidden_size
        weights = sum(p.numel() for name, p in model.named_parameters() if ".layer." in name and p.ndim == 2)
        return float((lengths * (6 * weights + 12 * layers * width * lengths)).sum())

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main(check: bool) -> int:
    """Print the table; returns the exit code."""
    if not (check or torch.cuda.is_available()):
        print("there is no GPU to measure; --check runs a tiny encoder on the CPU")
        return 1
    prepare_process(1, 0)
    encoder, batches, steps = (Tiny(vocabulary=2000), [16], 2) if check else (BASE, [32, 128, 512], 20)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = next((value for name, value in PEAKS.items() if name in device), None)
    plan = SplitPlan(0.1, test_fraction=0.15, stratify_by="label", content=("text",), group_by="file")
    source = DocstringSource()
    workload = TextClassification(source, plan, encoder, max_length=MAX_LENGTH)
    print(f"{device}, {encoder}, {ROUNDS} alternating rounds of {steps} steps, compilation excluded")
    print(
        "| batch | torch.compile | tokens/s, median (min–max) | padding | TFLOP/s | of peak | precision | GiB, peak |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        snapshot, _ = snapshot_of(Store(Path(scratch)), source.load().digest(), workload)
        makers = [partial(Contender, workload, snapshot, batch, Path(scratch) / "c") for batch in batches]
        for make in makers:
            compare(make, steps, peak)
        for compiled in (False, True):
            verdict = "the same weights" if repeats(makers[0], compiled, steps) else "OTHER WEIGHTS"
            how = "with" if compiled else "without"
            print(f"{steps} steps done twice {how} torch.compile end in {verdict}")
    return 0


def repeats(make: Callable[[bool], Contender], compiled: bool, steps: int) -> bool:
    """Whether two trainings of some steps end in the same weights, bit for bit."""
    digests = set()
    for _ in range(2):
        path = make(compiled)
        path.measure(steps)
        digests.add(weights_digest(path.trainer.model.state_dict()))
    return len(digests) == 1


def compare(make: Callable[[bool], Contender], steps: int, peak: float | None) -> None:
    """Alternate the same training with and without torch.compile, and print a row for each."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    paths = {compiled: make(compiled) for compiled in (False, True)}
    found: dict[bool, list[tuple[float, float, float]]] = {name: [] for name in paths}
    for path in paths.values():
        path.measure(steps)  # compiles, and warms up
    for _ in range(ROUNDS):
        for name, path in paths.items():
            found[name].append(path.measure(steps))
    gibibytes = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    for name, rounds in found.items():
        tokens, padded, operations = (statistics.median(column) for column in zip(*rounds, strict=True))
        rates = [row[0] for row in rounds]
        share = f"{operations / peak:.1%}" if peak else "–"
        path = paths[name]
        print(
            f"| {path.batch} | {'yes' if name else 'no'} | {tokens:,.0f} ({min(rates):,.0f}–{max(rates):,.0f}) "
            f"| {1 - tokens / padded:.1%} | {operations / 1e12:.2f} | {share} "
            f"| {path.trainer.progress.precision} | {gibibytes:.1f} (both) |",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
