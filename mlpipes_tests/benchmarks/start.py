"""Benchmark: from the submission of a Ray job to the first step, and to its end, beside the same by bare Ray Train.

Run as `python -m mlpipes_tests.benchmarks.start [ROUNDS]`: digits on one and two workers, in turns on the same Ray that is
up already, after one round that is not counted. What a job takes besides its training has its start, its checkpoints'
last writes, and its end in it.
"""

import itertools
import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

from mlpipes.compute.jobs import JobHandle, JobState
from mlpipes.compute.local import LocalRay
from mlpipes.compute.ray_jobs import RayJobs
from mlpipes.store.outcome import Outcome
from mlpipes_tests.benchmarks import bare_ray
from mlpipes_tests.benchmarks.figures import record
from mlpipes_tests.sandbox import CHECKOUT
from mlpipes_tests.training.harness import make_job

BATCH, EPOCHS = 128, 10
_OVER = (JobState.SUCCEEDED, JobState.FAILED, JobState.STOPPED, JobState.LOST)
_numbers = itertools.count()
Times = tuple[float, float]
"""Seconds to the first step, and all but the training's."""


def ours(jobs: RayJobs, folder: Path, workers: int) -> Times:
    """A training of ours: a new seed is a new training, of the same snapshot."""
    job = make_job(folder / "store", f"w{workers}-b{BATCH}-e{EPOCHS}-g0", seed=next(_numbers))
    begun = time.time()
    handle = jobs.attach_or_submit(job)
    ended = _ended(jobs, handle)
    outcome = Outcome.read(job.folder.result)
    first = next(at for name, _, _, at in outcome.history if name == "train/loss") / 1000
    return first - begun, ended - begun - outcome.train_seconds


def bare(jobs: RayJobs, folder: Path, workers: int) -> Times:
    """The same by Ray Train alone."""
    number = next(_numbers)
    place = folder / f"bare-{number}"
    place.mkdir()
    words = [sys.executable, bare_ray.__file__, workers, BATCH, EPOCHS, place]
    client = jobs._patiently(lambda client: client)
    begun = time.time()
    identifier = client.submit_job(
        entrypoint=f"exec {shlex.join(map(str, words))}", runtime_env={"env_vars": {"PYTHONPATH": str(CHECKOUT)}}
    )
    ended = _ended(jobs, JobHandle(identifier, 1, attached=False))
    times = json.loads((place / "times.json").read_text(encoding="utf-8"))
    return times["first"] - begun, ended - begun - times["training_seconds"]


def _ended(jobs: RayJobs, handle: JobHandle) -> float:
    """When a job has ended. Raises RuntimeError if it failed."""
    while (state := jobs.status(handle).state) not in _OVER:
        time.sleep(0.05)
    if state != JobState.SUCCEEDED:
        raise RuntimeError(
            f"{handle.id} ended as {state}:\n{jobs._patiently(lambda c: c.get_job_logs(handle.id))[-3000:]}"
        )
    return time.time()


def main(rounds: int) -> int:
    """Measure and print; returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="mlpipes-start-", ignore_cleanup_errors=True) as scratch:
        folder, ray = Path(scratch), LocalRay(Path(scratch) / "ray")
        try:
            jobs = RayJobs(ray.ensure())
            print("| workers | | s to the first step, median (least–most) | s besides the training |")
            print("| --- | --- | --- | --- |")
            for workers in (1, 2):
                sides = {"mlpipes": ours, "bare Ray Train": bare}
                found: dict[str, list[Times]] = {name: [] for name in sides}
                for number in range(rounds + 1):
                    for name in list(sides)[:: 1 if number % 2 else -1]:
                        times = sides[name](jobs, folder, workers)
                        if number:  # the first round reads programs from the disk
                            found[name].append(times)
                _show(workers, found)
        finally:
            ray.stop()
    return 0


def _show(workers: int, found: dict[str, list[Times]]) -> None:
    medians = []
    for name, times in found.items():
        columns = list(zip(*times, strict=True))
        for what, values in zip(("to the first step", "besides the training"), columns, strict=True):
            record(f"{workers} workers, {name}, {what}", "s", values)
        medians.append([statistics.median(values) for values in columns])
        cells = [f"{statistics.median(v):.2f} ({min(v):.2f}–{max(v):.2f})" for v in columns]
        print(f"| {workers} | {name} | {' | '.join(cells)} |")
    ratios = [f"{mine / theirs:.2f}" for mine, theirs in zip(*medians, strict=True)]
    print(f"| {workers} | mlpipes ÷ bare | {' | '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5))
