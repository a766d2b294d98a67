"""Leftovers: nothing survives a test run; a process that does is named, ended, and makes the run fail.

The tests run in a child of this process, which adopts every process that they orphan (Linux' child subreaper), whatever it
calls itself and whatever session it is in. When the child has ended, by itself, by Ctrl-C or by SIGKILL, no process may be
left, and no state in the checkout. All temporary files are in one folder, which goes then: processes that tests kill cannot
remove theirs.
"""

import ctypes
import os
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

_PR_SET_CHILD_SUBREAPER = 36
_GRACE_SECONDS = 60.0
"""For processes that were told to end and are on their way."""
_STATE = ".mlpipes"


def watch(config: pytest.Config) -> None:
    """Fork; the child goes on with the tests, this process waits for it, looks for leftovers, and exits."""
    if sys.platform != "linux" or hasattr(config, "workerinput") or config.option.collectonly:
        return
    # The user's own pytest folders stay where they are, to be looked at; all else goes with this run.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    temporary = Path(tempfile.mkdtemp(prefix="t-"))  # short: it holds Unix sockets
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    state = config.rootpath / _STATE
    had_state = state.exists()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        return
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)
    # Ctrl-C reaches the child by itself; it is the one that has something to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    code = _reap_until(child)
    left = [f"process {p}" for p in _end_survivors()]
    left += [f"folder {state}"] if state.exists() and not had_state else []
    shutil.rmtree(temporary, ignore_errors=True)
    if left:
        print("\nLeft behind by the tests:", *left, sep="\n  ", flush=True)
    os._exit(code or bool(left))


def _reap_until(child: int) -> int:
    """Bury what the tests orphan until they have ended; returns their exit code."""
    while True:
        pid, status = os.wait()
        if pid == child:
            return os.waitstatus_to_exitcode(status) % 256


def _end_survivors() -> list[str]:
    """Give what is on its way its time, end the rest, and say what that was."""
    _, alive = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=_GRACE_SECONDS)
    described = []
    while alive:
        for process in alive:
            with suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE:
                    described.append(f"{process.pid}: {' '.join(process.cmdline())[:200]}")
                process.kill()
        _, alive = psutil.wait_procs(alive, timeout=_GRACE_SECONDS)
        alive += psutil.Process().children(recursive=True)  # orphans of those
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    return described
