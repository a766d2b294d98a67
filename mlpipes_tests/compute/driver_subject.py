"""A driver to be forked in tests: it tells what it finds, and ends as it is asked to.

Run as `<file> <end>`, where an end is `exit <code>`, `error`, or `wait`, for a SIGTERM, upon which it exits with 7.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np


def main(target: Path, end: str, code: str = "0") -> None:
    """Tell, and end."""
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    descriptors = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    told = {
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
            sys.exit(7)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
