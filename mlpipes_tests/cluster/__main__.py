"""`make cluster` and `make cluster-down`: one cluster per checkout that stays until it is told to end."""

import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from mlpipes_tests.cluster import queues, software
from mlpipes_tests.cluster.cluster import Cluster, end, end_leftovers, lacking

_NAME = f"mlpipes-kept-{hashlib.sha256(str(software.PROJECT).encode()).hexdigest()[:8]}"
_NAMESPACE = "training"


def main(action: str, nodes: str = "2") -> str:
    """`up` with so many nodes, or `down`; returns what to say about it."""
    os.environ["PATH"] += ":/usr/sbin:/sbin:/usr/local/go/bin"
    if lacks := lacking():
        raise SystemExit(lacks)
    folder = Path(tempfile.gettempdir()) / _NAME
    end_leftovers()
    end(_NAME)
    shutil.rmtree(folder, ignore_errors=True)
    if action == "down":
        return "no cluster of this checkout runs any more"
    folder.mkdir()
    cluster = Cluster(folder, _NAME, nodes=int(nodes))
    try:
        cluster.start()
        cluster.kubectl.apply(software.namespace(_NAMESPACE, folder / "store"))
        cluster.kubectl.apply(queues.queue(_NAMESPACE, {"cpu": "2", "memory": "16Gi"}))
    except BaseException:
        cluster.stop()
        raise
    stages = ", ".join(f"{stage} after {seconds} s" for stage, seconds in cluster.seconds.items())
    return (
        f"{stages}\n"
        f"namespace {_NAMESPACE}: claims on this host's programs, and on {folder / 'store'} as {software.STORE}; "
        f"queue {queues.NAME}\n"
        f"export KUBECONFIG={cluster.kubeconfig}\n"
        f"alias kubectl='{cluster.kubectl.command[0]} kubectl'"
    )


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
