"""Benchmark: CIFAR-10 to the same accuracy by us, by a plain torchvision script, and by bare Ray Train with usual loaders.

Run as `python -m mlpipes_tests.benchmarks.peers [ROUNDS]`, with MLPIPES_REAL_DATA set: seconds on this machine from the
submission of a job to a Ray that is up (of the script: from its start) to the end of the epoch that is right often enough on
images held out. The network, its optimizers and the number of epochs are the same; so are the images.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlpipes.compute.jobs import JobHandle, JobState
from mlpipes.compute.local import LocalRay
from mlpipes.compute.ray_jobs import RayJobs
from mlpipes.data.snapshot import open_snapshot
from mlpipes.data.sources import CIFAR10_VARIABLE
from mlpipes.store.outcome import Outcome
from mlpipes_tests.benchmarks import usual_images
from mlpipes_tests.benchmarks.figures import record
from mlpipes_tests.benchmarks.usual_images import BATCH, EPOCHS
from mlpipes_tests.sandbox import CHECKOUT
from mlpipes_tests.training.harness import make_job

TARGET, WORKERS = 0.7, 2
WORKLOAD = "mlpipes.workloads.image_classification:cifar10"
Reached = tuple[float, float]
"""Seconds to the target, or infinity, and the accuracy in the end."""


def by_us(jobs: RayJobs, folder: Path, seed: int) -> Reached:
    """A training of ours."""
    job = make_job(folder / "store", f"w{WORKERS}-b{BATCH}-e{EPOCHS}-g0", WORKLOAD, seed=seed)
    begun = time.time()
    _wait(jobs, jobs.attach_or_submit(job))
    history = Outcome.read(job.folder.result).history
    return _reached([(value, at / 1000 - begun) for name, value, _, at in history if name == "validation/accuracy"])


def by_script(jobs: RayJobs, folder: Path, seed: int) -> Reached:
    """The plain script."""
    return _usual(
        folder, seed, lambda words: subprocess.run(words, check=True, env=_ENVIRONMENT, capture_output=True), 0
    )


def by_ray_train(jobs: RayJobs, folder: Path, seed: int) -> Reached:
    """The same by Ray Train alone."""

    def submit(words: list[str]) -> None:
        client = jobs._patiently(lambda client: client)
        variables = {"PYTHONPATH": str(CHECKOUT)}
        known = client.submit_job(entrypoint=f"exec {' '.join(words)}", runtime_env={"env_vars": variables})
        _wait(jobs, JobHandle(known, 1, attached=False))

    return _usual(folder, seed, submit, WORKERS)


_ENVIRONMENT = os.environ | {"PYTHONPATH": str(CHECKOUT)}
SIDES = {"mlpipes": by_us, "bare Ray Train": by_ray_train, "plain script": by_script}


def _usual(folder: Path, seed: int, run: Callable[[list[str]], object], workers: int) -> Reached:
    place = folder / f"usual-{workers}-{seed}"
    place.mkdir()
    (place / "data.npz").symlink_to(folder / "data.npz")
    begun = time.time()
    run([sys.executable, usual_images.__file__, str(place), str(workers)])
    lines = [json.loads(line) for line in (place / "epochs.jsonl").read_text(encoding="utf-8").splitlines()]
    return _reached([(line["accuracy"], line["time"] - begun) for line in lines])


def _reached(curve: list[tuple[float, float]]) -> Reached:
    return next((at for accuracy, at in curve if accuracy >= TARGET), float("inf")), curve[-1][0]


def _wait(jobs: RayJobs, handle: JobHandle) -> None:
    while (state := jobs.status(handle).state) in (JobState.PENDING, JobState.RUNNING):
        time.sleep(0.1)
    if state != JobState.SUCCEEDED:
        raise RuntimeError(jobs._patiently(lambda client: client.get_job_logs(handle.id))[-3000:])


def main(rounds: int) -> int:
    """Measure and print; returns the exit code."""
    if not (real := os.environ.get("MLPIPES_REAL_DATA")):
        print("MLPIPES_REAL_DATA is not set: no real images to learn from")
        return 1
    os.environ[CIFAR10_VARIABLE] = str(Path(real) / "cifar10")
    with tempfile.TemporaryDirectory(prefix="mlpipes-peers-", ignore_cleanup_errors=True) as scratch:
        folder, ray = Path(scratch), LocalRay(Path(scratch) / "ray")
        snapshot = open_snapshot(make_job(folder / "store", f"w{WORKERS}-b{BATCH}-e{EPOCHS}-g0", WORKLOAD).snapshot)
        train, held = snapshot.columns("train"), snapshot.columns("validation")
        arrays = {name: np.asarray(train[name]) for name in ("image", "label")}
        arrays |= {f"validation_{name}": np.asarray(held[name]) for name in arrays}
        np.savez(folder / "data.npz", allow_pickle=False, **arrays)
        found: dict[str, list[Reached]] = {name: [] for name in SIDES}
        try:
            jobs = RayJobs(ray.ensure())
            by_us(jobs, folder, 1000)  # the first job of a Ray reads programs from the disk
            for number in range(rounds):
                for name in list(SIDES)[:: 1 if number % 2 == 0 else -1]:
                    found[name].append(SIDES[name](jobs, folder, number))
        finally:
            ray.stop()
    n = len(held["label"])
    print(f"CIFAR-10, {len(train['label']):,} images, {TARGET:.0%} of {n} held out, {EPOCHS} epochs, batch {BATCH}")
    for name, values in found.items():
        record(f"{name}: to {TARGET:.0%} of {n} held-out images", "s", [seconds for seconds, _ in values])
        told = ", ".join(f"{seconds:.0f} s ({accuracy:.1%} in the end)" for seconds, accuracy in values)
        print(f"{name}: {told}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1))
