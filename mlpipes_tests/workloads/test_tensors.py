"""Tensors and kernels: what a process is told before it computes."""

import subprocess
import sys

_TOLD = """
import sys, torch
from mlpipes.workloads.tensors import compute_deterministically
compute_deterministically()
assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
assert "torch._inductor" not in sys.modules, "nobody compiles"
import torch._inductor.config as inductor
assert inductor.deterministic, "and whoever does, does so deterministically"
compute_deterministically(False)
assert not torch.are_deterministic_algorithms_enabled() and not inductor.deterministic
"""


def test_deterministic_kernels_cost_no_import_of_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", _TOLD], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
