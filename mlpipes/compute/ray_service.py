"""A program of Ray's, run without what it would import for nothing: the client of Kubernetes.

The dashboard and each node's agent import it (0.7 CPU-seconds each, one after the other as a node starts) to watch a cluster
of KubeRay's, which no node is that we start. Without it they do what they do where it is not installed.

Run by its path: `python …/ray_service.py <program> <argument>…`.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    del sys.argv[0]
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(sys.argv[0]).parent)  # as if Python had been given the program itself
    sys.modules["kubernetes"] = None  # pyright: ignore[reportArgumentType] - its import raises ModuleNotFoundError
    runpy.run_path(sys.argv[0], run_name="__main__")
