"""Benchmark: what Dagster, Ray and MLflow take from a worker: its steps' CPU-seconds, and the engine's alone.

Run as `python -m mlpipes_tests.benchmarks.tax [PAIRS]`. Paragraphs of documentation are classified on one worker, launched
in a Dagster that `mlpipes dev` serves, with a checkpoint every fifteen seconds (four times as many as by default), and then
the same batches by the engine alone, without any, in turns. Only the worker's own process counts, with all of its threads,
and no evaluation.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from mlpipes.data.snapshot import snapshot_of
from mlpipes.store.layout import Store
from mlpipes.store.messages import CheckpointSaved, read_messages
from mlpipes.training.determinism import prepare_process
from mlpipes_tests.benchmarks import tax_definitions
from mlpipes_tests.benchmarks.figures import record
from mlpipes_tests.chaos.session import Session
from mlpipes_tests.training.harness import trainer_on

SCALE = f"w1-b64-e{tax_definitions.EPOCHS}-g0"
CHECKPOINT_EVERY_SECONDS = 15.0


def alone(store: Path, checkpoints: Path) -> int:
    """Train in this process by the engine alone, or, without a folder to clock it in, print the steps of an epoch."""
    prepare_process(1, 0)
    workload = tax_definitions.docstrings
    snapshot, _ = snapshot_of(Store(store), workload.source.load().digest(), workload)
    trainer = trainer_on(snapshot, workload, workload.hyperparameters(), SCALE, checkpoints)
    if tax_definitions.FOLDER not in os.environ:
        print(trainer.order.steps_per_epoch)
        return 0
    gc.freeze()  # as in the forks of the warm process
    for _ in range(tax_definitions.EPOCHS * trainer.order.steps_per_epoch):
        trainer._step()
    return 0


def saved(store: Path, steps: int) -> int:
    """Checkpoints of all trainings in a store that came before the last step."""
    files = store.glob("trainings/*/messages/*.jsonl")
    messages = (message for file in files for message in read_messages(file)[0])
    return sum(isinstance(message, CheckpointSaved) and message.step < steps for message in messages)


def main(pairs: int) -> int:
    """Measure and print; returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="mlpipes-tax-", ignore_cleanup_errors=True) as scratch:
        folder, figures = Path(scratch), Path(scratch) / "figures"
        figures.mkdir()
        words = [sys.executable, "-m", __spec__.name, "alone", str(folder / "store"), str(folder / "checkpoints")]
        steps = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])
        clocked = {
            tax_definitions.FOLDER: str(figures),
            tax_definitions.BATCHES: str(tax_definitions.SHARDS * steps),
        }
        place = folder / "session"
        place.mkdir()
        definitions = tax_definitions.__name__
        session = Session(place, workload="docstrings", scale=SCALE, reference=None, definitions=definitions)
        session.sandbox.environment |= clocked
        found: dict[str, list[float]] = {"the whole stack": [], "the engine alone": []}
        checkpoints, beside = list[int](), list[float]()

        def stack() -> None:
            before = saved(session.store.root, steps)
            run = session.launch(checkpoint_every_seconds=CHECKPOINT_EVERY_SECONDS)
            session.until(lambda: session.family(run)[:1] in (["SUCCESS"], ["FAILURE"]), "the run has ended")
            if session.family(run) != ["SUCCESS"]:
                raise RuntimeError(session.failure(run))
            checkpoints.append(saved(session.store.root, steps) - before)

        def engine() -> None:
            subprocess.run(words, check=True, env=os.environ | clocked)

        with session:
            session.until(session.is_ready, "Dagster can launch runs")
            sides = dict(zip(found, (stack, engine), strict=True))
            for number in range(pairs + 1):
                for name in list(sides)[:: 1 if number % 2 else -1]:
                    sides[name]()
                    (path,) = figures.iterdir()
                    told = json.loads(path.read_text(encoding="utf-8"))
                    path.unlink()
                    if number:  # the first pair starts Ray and reads programs from the disk
                        found[name].append(told["cpu_seconds"] / told["batches"] * tax_definitions.SHARDS * 1000)
                        if sides[name] is stack:
                            beside.append(1 - told["trained"] / told["cpu_seconds"])
    with_stack, without = found.values()
    for name, values in found.items():
        record(f"a step, {name}", "CPU-ms", values)
        print(f"{name}: {statistics.median(values):.2f} CPU-ms a step ({min(values):.2f}–{max(values):.2f})")
    record("checkpoints in a run with the whole stack", "count", checkpoints[1:])
    print(f"checkpoints in a run with the whole stack: {checkpoints[1:]}")
    record("CPU time of a worker with the whole stack that is not of the thread that trains", "share", beside)
    print(f"of a worker with the whole stack, beside the thread that trains: {statistics.median(beside):.4f}")
    ratios = [bare / whole for whole, bare in zip(with_stack, without, strict=True)]
    record("engine's speed that the stack leaves", "share", ratios)
    print(f"what the stack leaves of the engine's speed: {statistics.median(ratios):.3f}, {pairs} pairs")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["alone"]:
        sys.exit(alone(Path(sys.argv[2]), Path(sys.argv[3])))
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10))
