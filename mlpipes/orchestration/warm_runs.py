"""Runs that start warm: Dagster's code server forks them from a process that has imported what all of them need."""

import gc
import importlib
import importlib.util
import logging
import multiprocessing
import os
import sys
from contextlib import suppress
from functools import cache, wraps
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from typing import Any

AHEAD_VARIABLE = "MLPIPES_WARM_RUNS"
"""Environment variable by which `mlpipes dev` tells its code servers that they will start runs."""
PRELOADED = (
    *("dagster._grpc.impl", "dagster._grpc.server"),
    *("mlflow", "mlflow.store.tracking.sqlalchemy_store"),
    *("torch", "torch._dynamo", "torch.export"),
    *("sklearn.metrics", "matplotlib.figure", "matplotlib.backends.backend_agg"),
)
"""What a run imports of others. Not our own code, nor a user's: a reload of the code location would leave it as it was.
Nor Ray, which reads its environment when it is imported."""


@cache
def _forking() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_installed())
    return context


def _installed() -> list[str]:
    return [name for name in PRELOADED if importlib.util.find_spec(name.partition(".")[0])]


def preload() -> None:
    """Import in this process what a run in it imports of others, while it would only wait."""
    for name in _installed():
        with suppress(Exception):  # the run that needs it says what is wrong
            importlib.import_module(name)


def how_to_start() -> BaseContext:
    """How a run's process is to be started: forked from the warm process, or by itself where there cannot be one.

    The warm process imports before it forks, and ends with the code server, whatever kills it.
    """
    context = _forking()
    try:
        forkserver.ensure_running()
    except OSError as error:  # such as a temporary folder whose path is too long for a socket
        logging.getLogger(__name__).warning(f"Runs start without a warm process: {error}")
        return multiprocessing.get_context("spawn")
    return context


def warm_runs() -> None:
    """Have the code server that loads this start its runs so; without effect in other programs.

    Under `mlpipes dev` the warm process starts at once: the first run would wait ten seconds for its imports. Other code
    servers, such as those whose runs are pods, may never start a run.

    Dagster's server starts them by a context of multiprocessing, which it sets itself and which no option names.
    """
    if multiprocessing.parent_process() is not None:
        # In such a run. To look for garbage among what was imported takes a second, and copies memory that it shares.
        gc.freeze()
    server = getattr(sys.modules.get("dagster._grpc.server"), "DagsterApiServer", None)
    if server is None or hasattr(server.StartRun, "__wrapped__"):
        return
    start = server.StartRun

    @wraps(start)
    def start_warm(self: Any, request: Any, context: Any) -> Any:
        self._mp_ctx = how_to_start()
        return start(self, request, context)

    server.StartRun = start_warm
    if os.environ.get(AHEAD_VARIABLE) and multiprocessing.parent_process() is None:  # not in a run, which starts none
        how_to_start()
