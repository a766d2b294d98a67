"""How the cost of what a user waits for grows: with scales, trainings, checkpoints, messages and MLflow's runs.

`python -m mlpipes_tests.benchmarks.growth [definitions trainings …]` measures each size in a process of its own: CPU-seconds
without imports, and by how much the process's peak of memory grew meanwhile. The exponent is the slope between the two
largest sizes on logarithmic axes: 1 is linear. Small sizes are mostly constant costs.
"""

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from mlpipes_tests.benchmarks.figures import record

WORKLOAD, SCALE = "digits", "w1-b128-e1-g0"
Measured = Callable[[], object]


def definitions(size: int, _: Path) -> Measured:
    """All definitions of a workload with so many scales, as a code server loads them."""
    from mlpipes.definitions import build_defs
    from mlpipes.scales import scales_of
    from mlpipes.workloads.catalog import CATALOG, Entry

    def load() -> object:
        scales = scales_of([f"w1-b128-e{epochs}-g0" for epochs in range(1, size + 1)], "growth")
        entry = Entry(WORKLOAD, CATALOG[0].summary, CATALOG[0].implementation, scales)
        repository = build_defs(catalog=[entry]).get_repository_def()
        repository.load_all_definitions()
        return repository

    return load


def _trainings(size: int, root: Path, checkpoints: int = 0) -> None:
    """Finished-looking trainings: a recipe, and the messages of one attempt with some checkpoints."""
    from mlpipes.store.files import write_record
    from mlpipes.store.layout import Store
    from mlpipes.store.messages import CheckpointSaved, Started

    started = Started(step=0, total_steps=10, precision="fp32", workers=1).model_dump_json()
    saved = CheckpointSaved(step=5, path="step-00000005").model_dump_json()
    scale = {"workers": 1, "batch_size": 128, "epochs": 1}
    first = Store(root).training(f"{0:064x}").recipe
    for number in range(size):
        folder = Store(root).training(f"{number:064x}")
        path = folder.messages(1)
        path.parent.mkdir(parents=True)
        path.write_text("\n".join([started, *[saved] * checkpoints, ""]))
        folder.recipe.parent.mkdir(parents=True, exist_ok=True)
        if number == 0:
            write_record(first, {"workload": WORKLOAD, "scale": scale, "seed": 0})
        else:
            shutil.copy(first, folder.recipe)


def trainings(size: int, folder: Path) -> Measured:
    """`mlpipes status` of a store with so many trainings."""
    from mlpipes.store.layout import Store
    from mlpipes.store.status import all_statuses

    _trainings(size, folder)
    return lambda: all_statuses(Store(folder))


def messages(size: int, folder: Path) -> Measured:
    """The status of one training that has told of so many checkpoints."""
    from mlpipes.store.layout import Store
    from mlpipes.store.status import all_statuses

    _trainings(1, folder, checkpoints=size)
    return lambda: all_statuses(Store(folder))


def checkpoints(size: int, folder: Path) -> Measured:
    """The next save of a training that keeps so many checkpoints, and finding the one to go on from."""
    import torch

    from mlpipes.training.checkpoints import Checkpoints, Progress

    kept = Checkpoints(folder, keep_last=size)
    state = {"weight": torch.zeros(4)}
    made = kept.save(state, [], Progress(step=1))
    for step in range(2, size + 1):
        shutil.copytree(made, kept.path(step))
    for step in {max(1, size - 1), size}:  # what is copied says that it is of step 1
        shutil.rmtree(kept.path(step))
        kept.save(state, [], Progress(step=step))
    newest = Checkpoints(folder, keep_last=2)

    def save_and_find() -> None:
        kept.save(state, [], Progress(step=size + 1))
        found, warnings = newest.latest()
        assert found is not None, warnings
        assert found.step == size + 1, warnings

    return save_and_find


def tracked(size: int, folder: Path) -> Measured:
    """Finding a training's MLflow run among so many, and a metric sent to it."""
    from mlpipes.tracking.runs import FINGERPRINT_TAG, Tracker

    os.environ["MLPIPES_HOME"] = str(folder)
    tracker = Tracker(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = tracker.experiment(WORKLOAD)
    for number in range(size):
        tracker.client.create_run(experiment, tags={FINGERPRINT_TAG: f"{number:064x}"})

    def find_and_log() -> None:
        run = tracker.run_of(WORKLOAD, f"{size // 2:064x}", SCALE, {}, {})
        tracker.log_values(run, {"loss": 0.5})

    return find_and_log


CURVES: dict[str, tuple[Callable[[int, Path], Measured], tuple[int, ...]]] = {
    "definitions": (definitions, (10, 100, 1_000, 10_000)),
    "trainings": (trainings, (10, 100, 1_000, 10_000)),
    "messages": (messages, (100, 1_000, 10_000, 100_000)),
    "checkpoints": (checkpoints, (10, 100, 1_000, 10_000)),
    "tracked": (tracked, (10, 100, 1_000)),
}


def measure(curve: str, size: int) -> tuple[float, float]:
    """CPU-seconds and MiB of one size, here."""
    prepare, sizes = CURVES[curve]
    with tempfile.TemporaryDirectory(prefix="mlpipes-growth-") as warm, tempfile.TemporaryDirectory() as folder:
        prepare(min(sizes), Path(warm))()  # imports, and what is kept for the next time
        work = prepare(size, Path(folder))
        peak, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        work()
        used = time.process_time() - begun
        return used, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024


def main(
    curves: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(CURVES)}; default: all")] = None,
    point: Annotated[int | None, typer.Option(help="measure this size only, and print it as JSON")] = None,
) -> None:
    """Measure curves; print a table."""
    names = curves or list(CURVES)
    if unknown := [name for name in names if name not in CURVES]:
        raise typer.BadParameter(f"there is no curve {unknown[0]!r}; there are {', '.join(CURVES)}")
    if point is not None:
        typer.echo(json.dumps(measure(names[0], point)))
        return
    typer.echo("| what | size | CPU-s | MiB more | exponent |\n| --- | --- | --- | --- | --- |")
    for name in names:
        before: tuple[int, float] | None = None
        for size in CURVES[name][1]:
            command = [sys.executable, "-m", __spec__.name, name, "--point", str(size)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            seconds, mib = json.loads(done.stdout.splitlines()[-1])
            slope = f"{math.log(seconds / before[1]) / math.log(size / before[0]):.2f}" if before else ""
            typer.echo(f"| {name} | {size:,} | {seconds:.3g} | {mib:.1f} | {slope} |")
            record(f"{name}, {size}", "CPU-seconds", [seconds])
            record(f"{name}, {size}, memory", "MiB", [mib])
            before = size, seconds


if __name__ == "__main__":
    typer.run(main)
