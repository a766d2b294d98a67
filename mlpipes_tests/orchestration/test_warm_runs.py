"""The warm process that runs are forked from: what may not happen before a fork, and where there cannot be one."""

import logging
import subprocess
import sys

import pytest

from mlpipes.orchestration import warm_runs
from mlpipes_tests.waiting import LIMIT_SECONDS

_ASKED = """
import torch

asked = []
count = torch._C._cuda_getDeviceCount
torch._C._cuda_getDeviceCount = lambda: asked.append(1) or count()
torch.cuda.is_available()
assert asked, "this is how torch looks for GPUs"
asked.clear()
from mlpipes.orchestration.warm_runs import PRELOADED
for name in PRELOADED:
    __import__(name)
print("asked", len(asked), "initialized", torch.cuda.is_initialized())
"""


def test_nothing_that_is_imported_before_the_fork_looks_for_a_gpu() -> None:
    """After that, CUDA refuses to work in a forked process."""
    done = subprocess.run(
        [sys.executable, "-c", _ASKED], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=True
    )
    assert done.stdout == "asked 0 initialized False\n"


def test_where_there_can_be_no_warm_process_runs_start_by_themselves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused() -> None:
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr(warm_runs.forkserver, "ensure_running", refused)
    with caplog.at_level(logging.WARNING):
        assert warm_runs.how_to_start().get_start_method() == "spawn"
    assert "start without a warm process: AF_UNIX path too long" in caplog.text
