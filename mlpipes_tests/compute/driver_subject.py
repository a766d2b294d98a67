"""A driver to be forked in tests: it tells what it finds, and ends as it is asked to.

Run as `<file> <end>`, where an end is `exit <code>`, `error`, or `wait`, for a SIGTERM, upon which it exits with 7; it has
started a process of its own then.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np


def main(target: Path, end: str, code: str = "0") -> None:
    """Tell, and end."""
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    descriptors = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    child = subprocess.Popen(["sleep", "1000"]) if end == "wait" else None
    told = {
        "child": child.pid if child else None,
        "umask": os.umask(0o077),
        "blocked": sorted(int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "pid": os.getpid(),
        "parent": os.getppid(),
        "arguments": sys.argv[1:],
        "module": __name__,
        "folder": str(Path.cwd()),
        "path": sys.path,
        "environment": dict(os.environ),
        "sockets": [path for path in descriptors if "socket:" in path],
        "drawn": np.random.random(),
        "warm": "torch" in sys.modules,
        "imported": sorted(sys.modules),
        "collects": gc.isenabled(),
        "never_collected": gc.get_freeze_count(),
    }
    target.with_suffix(".new").write_text(json.dumps(told))
    target.with_suffix(".new").rename(target)
    print(f"to output by {target.name}")
    print(f"to errors by {target.name}", file=sys.stderr)
    match end:
        case "exit":
            sys.exit(int(code))
        case "error":
            raise RuntimeError("an error of the driver's")
        case _:
            over.wait()
            assert child is not None
            child.kill()
            sys.exit(7)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
