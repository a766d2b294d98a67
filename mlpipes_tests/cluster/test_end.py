"""Nothing stays of a cluster on this host, not even when its owner was killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mlpipes.compute.processes import running
from mlpipes_tests.cluster import cgroups, software
from mlpipes_tests.cluster.cluster import end_leftovers, kubernetes_cluster
from mlpipes_tests.cluster.machines import host_interfaces, run
from mlpipes_tests.waiting import until

pytestmark = pytest.mark.cluster

_OWNER = """
import sys, time
from pathlib import Path
from mlpipes_tests.cluster.cluster import kubernetes_cluster
with kubernetes_cluster(Path(sys.argv[1]), nodes=1, operators=()) as cluster:
    print(cluster.group.path, cluster.switch.network.interface, flush=True)
    time.sleep(3600)
"""


def traces(folder: Path, group: str, interface: str) -> list[str]:
    """What of a cluster is to be seen on this host."""
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]
    interfaces = [name for name in host_interfaces() if name == interface]
    processes = [p for p in map(_command, running()) if str(folder) in p]
    return [name for name in cgroups.named(group) if group] + mounts + interfaces + processes


def rules() -> list[str]:
    """The host's own firewall chains and bridges, and network namespaces with a name: none of which a cluster touches."""
    named = [str(path) for path in Path("/run/netns").glob("*")]
    chains = [line.split()[0] for line in run("iptables-save").splitlines() if line.startswith(":")]
    return sorted([*named, *chains, *(name for name in host_interfaces() if name.startswith(("veth", "cni", "br")))])


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_orderly_end_leaves_nothing(tmp_path: Path) -> None:
    with kubernetes_cluster(tmp_path, nodes=0, operators=()) as cluster:
        before = rules()
        seen = cluster.group.path, cluster.switch.network.interface
        assert len(traces(tmp_path, *seen)) > 5
    assert traces(tmp_path, *seen) == []
    assert rules() == before


def test_cluster_of_a_killed_owner_is_ended_by_the_next(tmp_path: Path) -> None:
    with kubernetes_cluster(tmp_path / "mine", nodes=0, operators=()) as cluster:
        folder = tmp_path / "killed"
        owner = subprocess.Popen(
            [sys.executable, "-c", _OWNER, str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(software.PROJECT)},
        )
        assert owner.stdout is not None
        with owner.stdout as output:
            group, interface = output.readline().split()
        assert group not in end_leftovers(), "its owner lives"
        owner.send_signal(signal.SIGKILL)
        owner.wait(60)
        assert traces(folder, group, interface), "it was to be left behind"
        assert group in end_leftovers()
        until(lambda: not traces(folder, group, interface), "nothing is left of it")
        cluster.wait_for_api()  # a cluster whose owner lives is left alone
