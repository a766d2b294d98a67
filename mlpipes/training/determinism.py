"""Determinism: seeds as pure functions of a position, the data order, digests of weights, precision and environment."""

import hashlib
import os
import platform
import random
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils import deterministic

from mlpipes.store.files import canonical_json
from mlpipes.training.heap import keep_freed_memory
from mlpipes.workloads.tensors import compute_deterministically, compute_fp32_in_full, has_native_bf16


def mixed_seed(*parts: Any) -> int:
    """A 63-bit seed from any JSON values. Random numbers depend on where training is, never on how it got there."""
    return int.from_bytes(hashlib.sha256(canonical_json(parts)).digest()[:8], "big") >> 1


def seed_random_numbers(seed: int) -> None:
    """Seed all that draws random numbers without a generator of its own: torch, NumPy and Python.

    A workload had better draw from torch; but one that does not must not give other bits each time, without a word.
    """
    if _has_accelerator():
        torch.manual_seed(seed)
    else:  # the same for the CPU, without a stack trace for each kind of device that might be initialized later
        torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


@cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()


@contextmanager
def random_numbers_from(seed: int) -> Iterator[None]:
    """Seeded in here, and as before afterwards."""
    numpys, pythons = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        seed_random_numbers(seed)
        try:
            yield
        finally:
            np.random.set_state(numpys)
            random.setstate(pythons)


def prepare_process(threads: int, seed: int, deterministic_kernels: bool = True) -> None:
    """Make this process compute the same bits every time: fixed threads, deterministic kernels, seeded RNG.

    Memory that a step frees is kept for the next (see `training/heap.py`), which leaves the bits as they are.
    An operation without a deterministic kernel then raises RuntimeError. A mere warning (`warn_only`) would not do: with it,
    attention on a GPU takes its faster kernels, which add gradients in an order of their own.
    """
    keep_freed_memory()
    torch.set_num_threads(threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS refuses to be deterministic
    compute_deterministically(deterministic_kernels)
    # A debugging aid that comes with deterministic algorithms and costs 7 % here: no kernel in use reads fresh memory.
    cast(Any, deterministic).fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    compute_fp32_in_full()
    seed_random_numbers(mixed_seed(seed, "model"))


POOL_BATCHES = 64
"""Batches whose samples are sorted by length together: enough for even lengths, few enough for random company."""


class DataOrder:
    """Which rows each step reads: a pure function of (seed, epoch, step), the same for every worker and after a crash.

    Each epoch is a fresh permutation of all rows; the remainder that does not fill a global batch is left out, another
    one every epoch. With `lengths` (int64, one a row), rows of like length share a batch, so that little is padded: pools
    of the permutation are sorted by length and cut into batches, which then come in random order.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, lengths: np.ndarray | None = None) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.steps_per_epoch = rows // batch_size
        self._lengths = None if lengths is None else torch.from_numpy(np.array(lengths))
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def batch(self, epoch: int, step: int) -> Tensor:
        """Rows (global batch size,) int64 of a step of an epoch, in order."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, "order", epoch))
            self._permutation = torch.randperm(self.rows, generator=generator)
            if self._lengths is not None:
                self._permutation = self._bucketed(self._permutation, self._lengths, generator)
            self._epoch = epoch
        return self._permutation[step * self.batch_size : (step + 1) * self.batch_size]

    def _bucketed(self, permutation: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
        kept = permutation[: self.steps_per_epoch * self.batch_size]
        pools = kept.split(POOL_BATCHES * self.batch_size)
        ordered = torch.cat([pool[torch.sort(lengths[pool], stable=True).indices] for pool in pools])
        batches = ordered.view(self.steps_per_epoch, self.batch_size)
        return batches[torch.randperm(self.steps_per_epoch, generator=generator)].reshape(-1)


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over the names, dtypes, shapes and bytes of a state dict, in name order."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return sha.hexdigest()


def resolve_precision(wanted: str, device: torch.device) -> str:
    """`bf16` or `fp32`: `auto` takes bf16 where the hardware has it."""
    if wanted != "auto":
        return wanted
    return "bf16" if has_native_bf16(device) else "fp32"


def environment(device: torch.device) -> dict[str, Any]:
    """What could make the same recipe give other bits: versions, hardware, threads, and the code's commit."""
    libraries = ("torch", "torchvision", "transformers", "tokenizers", "numpy", "ray", "mlflow", "dagster")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: version(name) for name in libraries},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "git": _git_state(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git_state() -> dict[str, Any] | None:
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(checkout), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "clean": not status}
