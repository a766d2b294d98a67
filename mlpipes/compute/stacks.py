"""Stack dumps of a training's processes on this machine, for whoever wants to know why it hung."""

import subprocess
import sys
from pathlib import Path

import psutil

from mlpipes.compute.processes import with_variable

FINGERPRINT_VARIABLE = "MLPIPES_FINGERPRINT"
"""Environment variable that every process of a training has, by which it is found."""


def processes_of(fingerprint: str) -> list[psutil.Process]:
    """The processes of a training on this machine: driver, controller, workers."""
    return with_variable(FINGERPRINT_VARIABLE, fingerprint)


def keep_stacks(fingerprint: str, target: Path) -> Path:
    """Write the stacks of all processes of a training to a file, with py-spy, which comes with Ray's dashboard."""
    spy, parts = Path(sys.executable).parent / "py-spy", []
    for process in processes_of(fingerprint):
        try:
            dump = subprocess.run([spy, "dump", "--pid", str(process.pid)], capture_output=True, text=True, timeout=15)
            parts.append(dump.stdout or f"pid {process.pid}: {dump.stderr}")
        except (OSError, subprocess.TimeoutExpired) as error:
            parts.append(f"pid {process.pid}: {error}")
    target.write_text("\n".join(parts) or "no process of the training is on this machine\n", encoding="utf-8")
    return target
