"""Golden values: what the first steps of small trainings came to, bit for bit, so that no change of numerics goes unseen.

`python -m mlpipes_tests.training.golden` writes them anew; do that after a change that is meant to change bits, and say so
in its commit. A change that is not meant to has a fault.

Bits depend on torch's version, on the instructions that its kernels use (the CPU's capability), and on libraries that choose
code or block sizes by the maker and the caches of a CPU. So these trainings run where no choice is left: kernels for AVX2,
which every x86 CPU of the last ten years has, MKL in the mode that gives the same bits on all of them, and neither oneDNN
nor NNPACK. What this machine computes when it may choose is compared with the same values to rounding.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

PATH = Path(__file__).with_name("golden.json")
RENEW = "python -m mlpipes_tests.training.golden"
PORTABLE = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE"}
"""Environment of a process whose bits are the same on every x86 CPU with AVX2."""
STAGES = ("rows", "loss", "gradient", "weights")
"""What is noted of each step, in the order in which it comes about."""
EXACT = tuple(f"{name} {precision}" for name in ("digits", "cifar10", "words") for precision in ("fp32", "bf16"))
"""Trainings with the same bits on any CPU; seen on an AMD EPYC (Zen 4) and on an Intel Haswell as QEMU plays it."""
CASES = (*EXACT, "augmented fp32")
"""And digits with rotations, which take sines from a library that chooses its code by the CPU's maker."""
_STEPS = 4

Trace = dict[str, Any]
"""Of one training: digests of the `data` and of the weights at the `start`, and `steps`, each with a value a stage."""


def trace(case: str, folder: Path) -> Trace:
    """The first steps of a case in this process, with its data and checkpoints in a folder."""
    import torch

    from mlpipes.data.snapshot import open_snapshot
    from mlpipes.training.determinism import prepare_process, weights_digest
    from mlpipes.workloads.catalog import load_workload
    from mlpipes_tests.training.harness import make_job, trainer_on

    name, precision = case.split()
    implementation, scale, options = _training(name, folder)
    job = make_job(folder, scale, implementation, precision=precision, **options)
    workload, snapshot = load_workload(implementation), open_snapshot(job.snapshot)
    hp = workload.hyperparameters.model_validate(job.recipe.hyperparameters)
    threads = torch.get_num_threads()
    prepare_process(1, 0)
    try:
        trainer = trainer_on(snapshot, workload, hp, scale, folder / "checkpoints")
        found: Trace = {"data": snapshot.digest[:12], "start": weights_digest(trainer.model.state_dict())[:12]}
        steps = []
        for _ in range(_STEPS):
            trainer._step()
            gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
            values = (
                trainer.progress.order_digest[:12],
                float(trainer._undrained[-1][0]),
                weights_digest(gradients)[:12],
                weights_digest(trainer.model.state_dict())[:12],
            )
            steps.append(dict(zip(STAGES, values, strict=True)))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    return found | {"steps": steps}


def _training(name: str, folder: Path) -> tuple[str, str, dict[str, Any]]:
    """Implementation, scale and hyperparameters of a training, its data written into a folder where it needs some."""
    from mlpipes_tests.data.test_snapshot import write_cifar
    from mlpipes_tests.texts import FOLDER, WORDS, write_tables
    from mlpipes_tests.training.harness import DIGITS

    if name in ("digits", "augmented"):
        return DIGITS, "w1-b64-e3-g0", {"affine": name == "augmented"}
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    if name == "words":
        os.environ[FOLDER] = str(write_tables(data))
        return WORDS, "w1-b32-e3-g0", {"dropout": 0.1, "learning_rate": 2e-3}
    noise, labels = np.random.default_rng(0), [n % 10 for n in range(20)]
    names = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    batches = {n: {b"data": noise.integers(0, 256, (20, 3072), np.uint8), b"labels": labels} for n in names}
    os.environ["MLPIPES_CIFAR10"] = str(write_cifar(data, **batches))
    return "mlpipes.workloads.image_classification:cifar10", "w1-b16-e3-g0", {"width": 8}


def portable_traces() -> dict[str, Any]:
    """All cases where no choice is left: `key` (torch and the capability), `traces` by case, `made_with` for people.

    Raises RuntimeError if a training fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "mlpipes_tests.training.golden", "--print"],
        env=os.environ | PORTABLE,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the trainings for golden values failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _print_traces() -> None:
    import torch

    torch.backends.mkldnn.set_flags(False)
    torch.backends.nnpack.set_flags(False)
    with tempfile.TemporaryDirectory() as folder:
        traces = {case: trace(case, Path(folder) / case.replace(" ", "-")) for case in CASES}
    release, capability = version("torch").partition("+")[0], torch.backends.cpu.get_cpu_capability()
    libraries = {name: version(name) for name in ("torch", "numpy", "transformers", "tokenizers")}
    found = {"key": f"torch {release} {platform.machine()} {capability}", "traces": traces}
    print(json.dumps(found | {"made_with": {"python": platform.python_version(), **libraries}}))


def first_difference(expected: Trace, found: Trace) -> str | None:
    """Where a training first differs from its golden values, in words; None if it does not."""
    if expected["data"] != found["data"]:
        return "the data differ"
    if expected["start"] != found["start"]:
        return "the weights before the first step differ"
    for number, (old, new) in enumerate(zip(expected["steps"], found["steps"], strict=True), start=1):
        for stage in STAGES:
            if old[stage] != new[stage]:
                return f"step {number}: {stage} {new[stage]}, before {old[stage]}; all that came before is equal"
    return None


def golden() -> Mapping[str, Any]:
    """The golden values, as `portable_traces` gave them."""
    return json.loads(PATH.read_text(encoding="utf-8"))


def main() -> None:
    """Write the golden values anew, or print this process's."""
    parser = argparse.ArgumentParser(prog=RENEW, description="Write the golden values anew.")
    parser.add_argument("--print", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().print:
        _print_traces()
        return
    found = portable_traces()
    PATH.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    digest = hashlib.sha256(PATH.read_bytes()).hexdigest()[:12]
    print(f"{PATH.name}: {len(found['traces'])} trainings of {_STEPS} steps for {found['key']} (file {digest})")


if __name__ == "__main__":
    main()
