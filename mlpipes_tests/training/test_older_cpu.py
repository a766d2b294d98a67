"""What is exact on this machine's CPU is exact on one with AVX2 only: tests that run again, as on such a CPU.

A kernel for another CPU rounds differently, as another seed would: what needs a certain rounding to pass is wrong.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlpipes.training.determinism import resolve_precision
from mlpipes_tests.conftest import NO_SKIPS, missing
from mlpipes_tests.sandbox import CHECKOUT

OLDER = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
"""Environment of a process that computes as on a CPU without AVX-512."""
AGAIN = (
    "training/test_older_cpu.py::test_kernels_and_precision_are_those_of_the_cpu_that_was_asked_for",
    "training/test_textbook.py::test_every_step_is_the_textbooks",
    "training/test_exactness.py::test_allreduce_agrees_to_rounding[2]",
    "training/test_exactness.py::test_crashed_in_mid_epoch_and_resumed_equals_uninterrupted[2-ordered]",
    "training/test_golden.py::test_whatever_kernels_this_machine_has_the_losses_are_the_same_to_rounding",
    "workloads/test_text.py::test_a_token_budget_changes_memory_and_not_the_model",
    "workloads/test_text.py::test_numbers_are_regressed",
)


def test_kernels_and_precision_are_those_of_the_cpu_that_was_asked_for() -> None:
    """Also a check of the run below: that it is the one it means to be."""
    capability = torch.backends.cpu.get_cpu_capability()
    assert os.environ.get("ATEN_CPU_CAPABILITY", capability).upper() == capability
    if capability == "AVX2":
        assert resolve_precision("auto", torch.device("cpu")) == "fp32"


@pytest.mark.long
def test_exactness_as_on_a_cpu_without_avx512(tmp_path: Path) -> None:
    if "ATEN_CPU_CAPABILITY" in os.environ:
        pytest.fail("these tests run as on an older CPU already; unset ATEN_CPU_CAPABILITY")
    if platform.machine() != "x86_64":
        missing("no x86 CPU: there is no older kind of it to compute as")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options = ["-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'older'}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(f"mlpipes_tests/{test}" for test in AGAIN)],
        cwd=CHECKOUT,
        env=kept | OLDER | {NO_SKIPS: "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
