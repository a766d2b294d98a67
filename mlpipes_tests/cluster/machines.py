"""Machines of a cluster on this one: each has a network, mounts and a control group of its own, all behind one switch.

All of a machine's mounts, interfaces and firewall rules end with its processes, whatever killed them: nothing is set on the
host but one interface, whose other end is in the switch.
"""

import ipaddress
import json
import os
import shlex
import signal
import subprocess
from pathlib import Path

from filelock import FileLock

from mlpipes_tests.cluster.cgroups import Cgroup
from mlpipes_tests.waiting import until

MAX_NODES = 15
_CHOICE = range(200, 250)
_SYSTEM_FOLDERS = ("/run", "/var/lib", "/var/log")
"""Where programs keep state at fixed paths: each machine has its own."""
_AGAIN = 'for _ in $(seq "$0"); do "$@"; code=$?; echo "$1 ended with $code"; sleep 1; done; exit "$code"'
"""Shell: run a program again whenever it has ended, `$0` times in all."""
DISK = Path("/run/disk")
"""Where a machine finds its folder: a path short enough for the sockets in it."""


class Network:
    """The addresses of one cluster: `10.X.0.0/16`, machines in `10.X.0`, the pods of node *i* in `10.X.(16+i)`."""

    def __init__(self, second: int) -> None:
        self.second = second
        self.host = f"10.{second}.0.254"
        self.pods = f"10.{second}.16.0/20"
        self.services = f"10.{second}.240.0/20"
        self.api_service = f"10.{second}.240.1"
        self.dns_service = f"10.{second}.240.10"
        self.interface = f"mlp{second}"

    def address(self, node: int) -> str:
        """The address of a machine."""
        return f"10.{self.second}.0.{16 + node}"

    def pods_of(self, node: int) -> str:
        """The range of the pods on a node."""
        return f"10.{self.second}.{16 + node}.0/24"


class Machine:
    """One machine; it lives from `start` until its group is killed."""

    def __init__(self, name: str, group: Cgroup, folder: Path) -> None:
        self.name, self.group, self.folder = name, group, folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._holder: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        """The process whose namespaces are this machine's."""
        assert self._holder is not None, f"{self.name} does not run"
        return self._holder.pid

    def start(self) -> None:
        """Make its namespaces, held by a process that does nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.group.create()
        script = [
            "mount --make-rshared /",  # kubelet's mounts are to be seen by containerd
            *(f"mount -t tmpfs none {folder}" for folder in _SYSTEM_FOLDERS),
            f"mkdir {DISK}",
            f"mount --bind {shlex.quote(str(self.folder))} {DISK}",
            f"mount --make-private {DISK}",  # else what is mounted below it would be mounted twice
            f"mount --make-shared {DISK}",
            "ip link set lo up",
            "echo 1 >/proc/sys/net/ipv4/ip_forward",
            "if [ -d /proc/sys/net/bridge ]; then echo 0 >/proc/sys/net/bridge/bridge-nf-call-iptables; fi",
            "echo ready",
            "exec sleep infinity",
        ]
        unshare = ["unshare", "--mount", "--net", "--propagation", "private", "sh", "-ec", "\n".join(script)]
        complaints = self.folder / "namespaces.log"
        with complaints.open("wb") as log:  # not our own stderr: who reads that would wait for the machine's end
            self._holder = subprocess.Popen(
                self.group.joining(*unshare),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        assert self._holder.stdout is not None
        with self._holder.stdout as output:
            assert output.readline() == "ready\n", f"{self.name} has no namespaces of its own: {complaints.read_text()}"

    def inside(self, *command: str) -> list[str]:
        """The command that runs another one on this machine."""
        return ["nsenter", f"--target={self.pid}", "--mount", "--net", "--", *command]

    def run(self, *command: str) -> str:
        """Run a command on it; returns its output. Raises AssertionError with what it said when it fails."""
        return run(*self.inside(*command))

    def spawn(self, name: str, *command: str, tries: int = 1) -> None:
        """Start a program that stays; its output is in `NAME.log`. With more tries, it is started again when it ends."""
        if tries > 1:
            command = ("sh", "-c", _AGAIN, str(tries), *command)
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self.group.joining(*self.inside(*command)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def end(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """End one of its programs and wait until it has ended."""
        process = self.processes.pop(name)
        os.killpg(process.pid, number)  # with who would start it again
        process.wait(60)

    def died(self) -> str:
        """Which of its programs have ended by themselves, and their last words; empty if none has."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                words = (self.folder / f"{name}.log").read_text(errors="replace")[-1500:]
                return f"{name} on {self.name} ended with {process.returncode}: {words}"
        return ""

    def kill(self) -> None:
        """End the whole machine at one moment, as when its power goes: its pods, mounts and network too."""
        self.group.kill()
        self.group.remove()
        for process in [*self.processes.values(), *([self._holder] if self._holder else [])]:
            process.wait(60)
        self.processes.clear()
        self._holder = None


class Switch(Machine):
    """The switch that all machines of a cluster hang on, and this host too."""

    def __init__(self, group: Cgroup, folder: Path) -> None:
        super().__init__("switch", group, folder)
        self.network = Network(0)

    def start(self) -> None:
        """Choose addresses that are free here, and connect the host."""
        super().start()
        self.run("ip", "link", "add", "switch", "type", "bridge")
        self.run("ip", "link", "set", "switch", "up")
        with FileLock("/tmp/mlpipes-cluster-network.lock"):
            self.network = network = Network(_free_second_octet())
            _connect(f"{os.getpid()}", network.interface, self, "host")
            run("ip", "address", "add", f"{network.host}/24", "dev", network.interface)
            run("ip", "link", "set", network.interface, "up")
        for destination, by in self._routes().items():
            run("ip", "route", "add", destination, "via", by)

    def connect(self, machine: Machine, node: int) -> None:
        """Plug a machine in, with the address of a node's number and the ways to everything else."""
        _connect(f"{machine.pid}", "eth0", self, machine.name)
        machine.run("ip", "address", "add", f"{self.network.address(node)}/24", "dev", "eth0")
        machine.run("ip", "link", "set", "eth0", "up")
        routes = [
            f"route add {destination} via {by}"
            for destination, by in self._routes().items()
            if by != self.network.address(node) and destination != self.network.services
        ]
        routes += [f"route add unreachable {self.network.pods_of(node)}", f"route add default via {self.network.host}"]
        batch = machine.folder / "routes"
        batch.write_text("\n".join(routes) + "\n")
        machine.run("ip", "-batch", str(batch))

    def cut(self, machine: str) -> None:
        """Cut a machine's network: nothing in, nothing out, and nobody is told."""
        self.run("ip", "link", "set", machine, "down")

    def heal(self, machine: str) -> None:
        """Mend a cut network."""
        self.run("ip", "link", "set", machine, "up")

    def _routes(self) -> dict[str, str]:
        network = self.network
        pods = {network.pods_of(node): network.address(node) for node in range(MAX_NODES + 1)}
        return pods | {network.services: network.address(0)}


def run(*command: str, text: str | None = None, seconds: float = 300) -> str:
    """Run a command; returns its output. Raises AssertionError with what it said when it fails."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def host_interfaces() -> list[str]:
    """The names of this host's interfaces."""
    return [link["ifname"] for link in json.loads(run("ip", "-json", "link"))]


def wait_until_gone(interface: str) -> None:
    """Wait until the kernel has buried the namespace that an interface led to."""
    until(lambda: interface not in host_interfaces(), f"interface {interface} is gone with its cluster")


def _connect(pid: str, interface: str, switch: Machine, port: str) -> None:
    """A cable from a machine's interface to a port of the switch."""
    end = ["name", port, "netns", str(switch.pid)]
    run("ip", "link", "add", *end, "type", "veth", "peer", "name", interface, "netns", pid)
    switch.run("ip", "link", "set", port, "master", "switch", "up")


def _free_second_octet() -> int:
    taken = [
        ipaddress.ip_network(route["dst"], strict=False)
        for route in json.loads(run("ip", "-json", "route"))
        if route["dst"] != "default"
    ]
    for second in _CHOICE:
        whole = ipaddress.ip_network(f"10.{second}.0.0/16")
        if not any(whole.overlaps(network) for network in taken):
            return second
    raise AssertionError("no free network for a cluster: all of 10.200 to 10.249 have routes here")
