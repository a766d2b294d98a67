"""Benchmark: `mlpipes demo` from an empty home folder to its report: three scales of digits, and the start of a Ray.

Run as `python -m mlpipes_tests.benchmarks.demo [TIMES]`.
"""

import sys
import tempfile
import time
from pathlib import Path

from mlpipes_tests.benchmarks.figures import record
from mlpipes_tests.sandbox import Sandbox


def measure() -> float:
    """Seconds that it takes. Raises RuntimeError if it fails."""
    with tempfile.TemporaryDirectory(prefix="mlpipes-demo-") as folder:
        sandbox, begun = Sandbox(Path(folder)), time.monotonic()
        done = sandbox.run(".venv/bin/mlpipes demo")
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr)[-2000:])
        return time.monotonic() - begun


def main(times: int) -> int:
    """Measure and print; returns the exit code."""
    taken = [measure() for _ in range(times)]
    record("from an empty home to the report", "s", taken)
    print("mlpipes demo: " + ", ".join(f"{seconds:.0f} s" for seconds in taken), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1))
