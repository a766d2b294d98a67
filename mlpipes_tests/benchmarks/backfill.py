"""A backfill of many tiny partitions under a real `mlpipes dev`: how time and memory grow with their number.

`python -m mlpipes_tests.benchmarks.backfill 10 50` runs one after the other, each in a sandbox of its own.
"""

import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from mlpipes.compute.processes import with_variable
from mlpipes_tests.benchmarks.figures import record
from mlpipes_tests.sandbox import Sandbox, end, free_port, wait_for


def memory(sandbox: Sandbox) -> float:
    """MiB of proportional memory of all processes that work on the sandbox."""
    total, home = 0, str(sandbox.home)
    for process in with_variable("MLPIPES_HOME", home):
        with suppress(psutil.Error, OSError):
            total += process.memory_full_info().pss
    return total / 2**20


def measure(partitions: int) -> tuple[float, float, float, float]:
    """Seconds of the backfill, and MiB before it, at its greatest, and after it."""
    with tempfile.TemporaryDirectory(prefix="mlpipes-backfill-") as folder:
        sandbox = Sandbox(Path(folder))
        scales = "".join(f"  - w1-b{64 + n}-e1-g0\n" for n in range(partitions))
        (sandbox.path / "scales.yaml").write_text(f"digits:\n{scales}")
        sandbox.environment["MLPIPES_SCALES"] = str(sandbox.path / "scales.yaml")
        port = free_port()
        dev = sandbox.start(".venv/bin/mlpipes", "dev", "--port", str(port))
        try:
            wait_for(f"http://127.0.0.1:{port}/server_info")
            sandbox.run(".venv/bin/mlpipes ray up")
            before, greatest, began = memory(sandbox), 0.0, time.monotonic()
            backfill = sandbox.start(
                ".venv/bin/mlpipes", "backfill", "digits", "--ui", f"http://127.0.0.1:{port}", log="backfill.log"
            )
            while backfill.poll() is None:
                greatest = max(greatest, memory(sandbox))
                time.sleep(3)
            seconds = time.monotonic() - began
            if backfill.returncode:
                raise RuntimeError((sandbox.path / "backfill.log").read_text()[-2000:])
            return seconds, before, greatest, memory(sandbox)
        finally:
            end(dev)
            sandbox.run(".venv/bin/mlpipes ray down")


def main() -> int:
    """Print the table; returns the exit code."""
    print(
        "| partitions | s | s per partition | MiB before | MiB at most | MiB after |\n| --- | --- | --- | --- | --- | --- |"
    )
    for partitions in map(int, sys.argv[1:] or ["10", "50"]):
        seconds, before, greatest, after = measure(partitions)
        record(f"{partitions} partitions", "s a partition", [seconds / partitions])
        record(f"{partitions} partitions", "MiB at most", [greatest])
        figures = f"{seconds:.0f} | {seconds / partitions:.1f} | {before:,.0f} | {greatest:,.0f} | {after:,.0f}"
        print(f"| {partitions} | {figures} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
