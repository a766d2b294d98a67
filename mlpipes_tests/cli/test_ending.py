"""Commands end at once, and those that are told to end take down with them what they have started."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from mlpipes.compute.processes import with_variable
from mlpipes_tests.sandbox import CHECKOUT
from mlpipes_tests.waiting import LIMIT_SECONDS, until

ENDLESS = "w1-b128-e50000-g0"


def test_a_demo_that_is_terminated_ends_the_ray_that_it_started(tmp_path: Path) -> None:
    (tmp_path / "scales.yaml").write_text(f"digits: [{ENDLESS}]\n")
    environment, log = os.environ | {"MLPIPES_HOME": str(tmp_path / "home")}, tmp_path / "log"
    environment |= {"MLPIPES_SCALES": str(tmp_path / "scales.yaml")}
    command = [str(CHECKOUT / ".venv" / "bin" / "mlpipes"), "demo"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=tmp_path)
    try:
        until(lambda: "are ready after" in log.read_text(), "Ray runs", vain=lambda: str(process.poll() or ""))
        assert len(with_variable("MLPIPES_HOME", environment["MLPIPES_HOME"])) > 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_SECONDS) == 130, log.read_text()
    finally:
        process.kill()
    assert "The same command goes on where it was." in log.read_text()
    until(lambda: not with_variable("MLPIPES_HOME", environment["MLPIPES_HOME"]), "nothing is left")


def test_at_its_end_a_command_looks_for_no_garbage_and_loses_nothing_that_was_written(tmp_path: Path) -> None:
    module = "file = open('module.txt', 'w')\nfile.write('kept')\ndef function() -> None: ...\n"
    (tmp_path / "user.py").write_text(module)
    told = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count() > 10_000))
from mlpipes.cli.common import friendly

def command():
    import user
    garbage = [open("garbage.bin", "wb")]
    garbage[0].write(b"kept")
    garbage.append(garbage)
    print(gc.get_freeze_count())

friendly(command)()
"""
    path = {"PYTHONPATH": f"{CHECKOUT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-c", told]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=True, cwd=tmp_path, env=os.environ | path
    )
    assert done.stdout == "0\nTrue\n"
    assert (tmp_path / "module.txt").read_text() == (tmp_path / "garbage.bin").read_text() == "kept"
