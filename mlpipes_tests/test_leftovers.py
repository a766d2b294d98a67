"""The look for leftovers itself: a test run that leaves something behind fails and says what, however it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mlpipes_tests.sandbox import CHECKOUT
from mlpipes_tests.waiting import until

_CONFTEST = """
from mlpipes_tests import leftovers

leftovers._GRACE_SECONDS = 5.0  # what is left here never ends by itself

def pytest_configure(config):
    leftovers.watch(config)
"""
_ORPHAN = """
import os, subprocess, sys, time
from pathlib import Path

def leave_process():
    # Nothing tells whose it is: no variable, no session, no parent.
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'],"
    code += " stdin=-3, stdout=-3, stderr=-3, env={}, start_new_session=True).pid)"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    Path("made").write_text(made.stdout)
    Path("made").rename("pid")
"""


def start(folder: Path, test: str) -> "subprocess.Popen[str]":
    (folder / "conftest.py").write_text(_CONFTEST)
    (folder / "test_it.py").write_text(_ORPHAN + test)
    (folder / "pytest.ini").write_text("[pytest]\n")
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def orphan_is_gone(folder: Path) -> bool:
    pid = int((folder / "pid").read_text())
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("outcome", ["", "; assert False"])
def test_a_process_that_is_left_is_named_and_ended(tmp_path: Path, outcome: str) -> None:
    run = start(tmp_path, f"\ndef test_it():\n    leave_process(){outcome}\n")
    said, _ = run.communicate()
    assert run.returncode == 1, said
    assert "1 failed" in said if outcome else "1 passed" in said
    assert f"Left behind by the tests:\n  process {(tmp_path / 'pid').read_text().strip()}: " in said
    assert orphan_is_gone(tmp_path)


def test_also_after_ctrl_c(tmp_path: Path) -> None:
    run = start(tmp_path, "\ndef test_it():\n    leave_process()\n    time.sleep(1000)\n")
    until((tmp_path / "pid").is_file, "the process is there", vain=lambda: "it ended" if run.poll() is not None else "")
    for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children()]:  # the terminal's whole group
        if process.pid != int((tmp_path / "pid").read_text()):
            process.send_signal(signal.SIGINT)
    said, _ = run.communicate()
    assert run.returncode == 2, said
    assert "KeyboardInterrupt" in said
    assert "Left behind by the tests:\n  process" in said
    assert orphan_is_gone(tmp_path)


def test_state_in_the_checkout_is_named(tmp_path: Path) -> None:
    run = start(tmp_path, "\ndef test_it():\n    Path('.mlpipes').mkdir()\n")
    said, _ = run.communicate()
    assert run.returncode == 1, said
    assert f"Left behind by the tests:\n  folder {tmp_path / '.mlpipes'}" in said


def test_temporary_files_go_with_the_run(tmp_path: Path) -> None:
    test = "\ndef test_it():\n    Path('where').write_text(__import__('tempfile').mkdtemp(prefix='mine-'))\n"
    run = start(tmp_path, test)
    said, _ = run.communicate()
    assert run.returncode == 0, said
    assert not Path((tmp_path / "where").read_text()).exists()


def test_who_leaves_nothing_passes(tmp_path: Path) -> None:
    run = start(tmp_path, "\ndef test_it():\n    subprocess.run(['true'])\n")
    said, _ = run.communicate()
    assert run.returncode == 0, said
    assert "Left behind" not in said
