"""The warm process that runs are forked from: what may not happen before a fork, and where there cannot be one."""

import gc
import logging
import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from types import SimpleNamespace

import psutil
import pytest

from mlpipes.compute import warm_process
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
import importlib, sys
for name in importlib.import_module(sys.argv[1]).PRELOADED:
    __import__(name)
print("asked", len(asked), "initialized", torch.cuda.is_initialized())
"""


@pytest.mark.parametrize("module", [warm_runs.__name__, warm_process.__name__])
def test_nothing_that_is_imported_before_the_fork_looks_for_a_gpu(module: str) -> None:
    """After that, CUDA refuses to work in a forked process."""
    done = subprocess.run(
        [sys.executable, "-c", _ASKED, module], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=True
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


def _tell_of_a_run(connection: Connection) -> None:
    os.environ[warm_runs.AHEAD_VARIABLE] = "1"  # as under `mlpipes dev`
    warm_runs.warm_runs()
    connection.send((gc.get_freeze_count(), [" ".join(child.cmdline()) for child in psutil.Process().children()]))


def test_runs_look_for_no_garbage_among_what_was_imported_and_start_no_warm_process_of_their_own() -> None:
    before = gc.get_freeze_count()
    warm_runs.warm_runs()
    assert gc.get_freeze_count() == before, "this process is no run"
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("forkserver")
    assert warm_runs.how_to_start() is context
    process = context.Process(target=_tell_of_a_run, args=(there,))
    process.start()
    try:
        assert here.poll(LIMIT_SECONDS)
        frozen, children = here.recv()
        assert frozen > 100_000
        assert not any("forkserver" in command for command in children)
    finally:
        process.join(LIMIT_SECONDS)


def test_what_cannot_be_imported_ahead_is_left_to_the_run_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_runs, "PRELOADED", ("json.no_such_module", "this"))
    monkeypatch.delitem(sys.modules, "this", raising=False)
    warm_runs.preload()
    assert "this" in sys.modules


@pytest.mark.parametrize("ahead", [True, False])
def test_only_under_mlpipes_dev_the_warm_process_starts_before_the_first_run(
    ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Server:
        def StartRun(self, request: object, context: object) -> object:  # noqa: N802 - Dagster's name
            return self._mp_ctx  # pyright: ignore[reportAttributeAccessIssue] - it is set before

    started = list[int]()
    monkeypatch.setitem(sys.modules, "dagster._grpc.server", SimpleNamespace(DagsterApiServer=Server))
    monkeypatch.setattr(warm_runs, "how_to_start", lambda: started.append(1) or "warm")
    monkeypatch.setenv(warm_runs.AHEAD_VARIABLE, "1" if ahead else "")
    for _ in range(2):  # as when a code location is loaded again in the same process
        warm_runs.warm_runs()
    assert len(started) == ahead
    assert Server().StartRun(None, None) == "warm"
