"""A whole cluster: start it, break it in every way that a test wants, and end all of it, also after a crash."""

import itertools
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from mlpipes_tests import evidence
from mlpipes_tests.cluster import addons, build, cgroups
from mlpipes_tests.cluster.certificates import Authority
from mlpipes_tests.cluster.cgroups import Cgroup
from mlpipes_tests.cluster.control_plane import ControlPlane
from mlpipes_tests.cluster.kubectl import Kubectl, has_condition
from mlpipes_tests.cluster.machines import Machine, Switch, wait_until_gone
from mlpipes_tests.cluster.nodes import CONTROL, PLUGINS, Node
from mlpipes_tests.conftest import missing
from mlpipes_tests.waiting import until

_PREFIX = "mlpipes-"
_PROGRAMS = ("go", "containerd", "ctr", "runc", "iptables", "ip", "nsenter", "unshare")
_counter = itertools.count()


class Cluster:
    """A cluster of a control plane and nodes `node-1`, `node-2`, …; its name is the name of its control group."""

    def __init__(
        self,
        folder: Path,
        name: str,
        nodes: int = 2,
        operators: Collection[str] = addons.OF_TRAINING,
        *,
        policies: bool = False,
    ) -> None:
        self.policies = policies
        """Whether network policies are enforced."""
        self.folder, self.group, self.size, self.operators = folder, Cgroup(name), nodes, operators
        self.switch = Switch(Cgroup(f"{name}/switch"), folder / "switch")
        self.nodes: dict[str, Node] = {}
        self.seconds: dict[str, float] = {}
        """How long after the start each stage was reached."""

    @property
    def kubeconfig(self) -> Path:
        """Lets the administrator in."""
        return self.folder / "certificates" / "admin.kubeconfig"

    def start(self) -> None:
        """Start everything and wait until it answers."""
        kube = build.program("kube")
        images = addons.make_images(self.folder / "images", self.operators)
        began = time.monotonic()
        self.switch.start()
        network = self.switch.network
        machines = {name: self._machine(name) for name in [CONTROL, *self._worker_names()]}
        for number, machine in enumerate(machines.values()):
            machine.start()
            self.switch.connect(machine, number)
            self.nodes[machine.name] = Node(machine, number, network)
        authority = Authority(self.folder / "certificates")
        self.plane = ControlPlane(machines[CONTROL], network, authority)
        self.kubectl = Kubectl(kube, self.plane.kubeconfig("admin", "admin", ["system:masters"]))
        for program in ("etcd", "apiserver"):
            self.plane.start(program)
        for node in self.nodes.values():
            node.configure(self.plane, authority)
            node.start_containerd()
        self.wait_for_api()
        self._reached("API server answers", began)
        for program in ("controllers", "scheduler"):
            self.plane.start(program)
        for name, node in self.nodes.items():
            node.import_images(images.get(name, images[""]))
            node.start_kubelet()
        addons.install_dns(self.kubectl, network)
        for operator in self.operators:
            addons.install_operator(self.kubectl, self.folder, operator)
        for name, node in self.nodes.items():
            self.wait_until_ready(name)
            if self.policies:
                node.start_firewall()
        self._reached("nodes are ready", began)
        addons.wait_for_dns(self.kubectl)
        for operator in self.operators:
            addons.wait_for_operator(self.kubectl, operator)
        self._reached("operators are available", began)

    def stop(self) -> None:
        """End all of it at one moment; nothing stays but files in its folder."""
        end(self.group.path, self.switch.network.interface)
        for machine in [self.switch, *(node.machine for node in self.nodes.values())]:
            machine.kill()

    def died(self) -> str:
        """Which program has ended by itself, and its last words; empty if none has."""
        return "; ".join(filter(None, (node.machine.died() for node in self.nodes.values())))

    def wait_for_api(self) -> None:
        """Wait until the API server is ready."""
        until(
            lambda: self.kubectl.tried("get", "--raw=/readyz").returncode == 0,
            "the API server is ready",
            vain=self.died,
            every=0.5,
        )

    def wait_until_ready(self, node: str, ready: bool = True) -> None:
        """Wait until a node is ready, or until it is no longer."""
        wanted = has_condition("Ready") if ready else (lambda found: not has_condition("Ready")(found))
        what = "is Ready" if ready else "is not Ready"
        self.kubectl.wait_for("node", node, wanted, what, vain=self.died if ready else lambda: "")

    def kill_program(self, name: str) -> None:
        """SIGKILL to `etcd`, `apiserver`, `controllers` or `scheduler`."""
        self.nodes[CONTROL].machine.end(name)

    def start_program(self, name: str) -> None:
        """Start a program of the control plane again."""
        self.plane.start(name)

    def kill_kubelet(self, node: str) -> None:
        """SIGKILL to a kubelet alone; its pods run on."""
        self.nodes[node].machine.end("kubelet")
        self.nodes[node].machine.end("proxy")

    def start_kubelet(self, node: str) -> None:
        """Start a kubelet again."""
        self.nodes[node].start_kubelet()

    def kill_node(self, node: str) -> None:
        """The power of a node goes: kubelet, containerd, all pods and its network at one moment, and nobody is told."""
        self.nodes[node].machine.kill()

    def start_node(self, name: str) -> None:
        """A node that was killed comes back with its disk."""
        node = self.nodes[name]
        node.machine.start()
        self.switch.connect(node.machine, node.number)
        node.start_containerd()
        node.import_images([])
        node.start_kubelet()
        if self.policies:
            node.start_firewall()

    def freeze_node(self, node: str) -> None:
        """A node hangs: everything on it stops where it is."""
        self.nodes[node].machine.group.freeze()

    def thaw_node(self, node: str) -> None:
        """A frozen node runs on."""
        self.nodes[node].machine.group.thaw()

    def cut_network(self, node: str) -> None:
        """Nothing reaches a node or leaves it; what is on it runs on."""
        self.switch.cut(node)

    def heal_network(self, node: str) -> None:
        """Mend a cut network."""
        self.switch.heal(node)

    def remembered(self, addresses: Collection[str]) -> list[int]:
        """Ports of this host whose connections to a Service the control node still takes for open ones to one of these pods.

        kube-proxy leaves that to the kernel: whoever connects from the same port is sent after that pod, be it long gone.
        What nobody answered is forgotten after two minutes, what was established after days.
        """
        lines = self.nodes[CONTROL].machine.run("cat", "/proc/net/nf_conntrack").splitlines()
        found = re.compile(
            rf" (?:SYN_SENT|ESTABLISHED) src={re.escape(self.switch.network.host)} dst=\S+ sport=(\d+) .*? src=(\S+) "
        )
        pairs = [match.groups() for line in lines if (match := found.search(line))]
        return [int(port) for port, pod in pairs if pod in addresses]

    def kill_operator(self, operator: str) -> None:
        """Delete the pods of an operator without grace; its Deployment makes new ones."""
        name, namespace = addons.OPERATORS[operator]
        labels = self.kubectl.find("deployment", name, namespace)
        assert labels is not None, f"no deployment {name} in {namespace}"
        selector = ",".join(f"{key}={value}" for key, value in labels["spec"]["selector"]["matchLabels"].items())
        self.kubectl(
            *("delete", "pods", f"--namespace={namespace}", f"--selector={selector}"),
            *("--grace-period=0", "--force"),
        )

    def cpu_seconds(self) -> float:
        """The processor time that all of its living processes have used."""
        total = 0.0
        for pid in self.group.pids():
            with suppress(psutil.Error):
                times = psutil.Process(pid).cpu_times()
                total += times.user + times.system
        return total

    def _worker_names(self) -> list[str]:
        return [f"node-{number}" for number in range(1, self.size + 1)]

    def _machine(self, name: str) -> Machine:
        return Machine(name, Cgroup(f"{self.group.path}/{name}"), self.folder / name)

    def _reached(self, stage: str, began: float) -> None:
        self.seconds[stage] = round(time.monotonic() - began, 1)


def end(name: str, interface: str = "") -> None:
    """End a cluster by the name of its control group, whoever started it."""
    group = Cgroup(name)
    group.kill()
    group.remove()
    if interface:
        wait_until_gone(interface)


def end_leftovers() -> list[str]:
    """End the clusters whose owner was killed; returns their names."""
    ended = []
    for name in cgroups.named(_PREFIX):
        pid, _, started = name.removeprefix(_PREFIX).partition("-")
        if not pid.isdigit():
            continue  # one that was left running on purpose
        started = started.partition("-")[0]
        if _start_time(int(pid)) != started:
            end(name)
            ended.append(name)
    return ended


def lacking() -> str:
    """What this machine lacks to run a cluster, in one line; empty if nothing."""
    if os.getuid():
        return "a Kubernetes of one's own takes root"
    if not cgroups.available():
        return "no control groups of version 1 here: the test cluster's nodes are made of them"
    if absent := [program for program in _PROGRAMS if shutil.which(program) is None]:
        return f"no {', '.join(absent)} on PATH: there is no Kubernetes to test with"
    return "" if PLUGINS.is_dir() else f"no {PLUGINS}: pods would have no network (Debian: containernetworking-plugins)"


@contextmanager
def kubernetes_cluster(
    folder: Path, nodes: int = 2, operators: Collection[str] = addons.OF_TRAINING, *, policies: bool = False
) -> Iterator[Cluster]:
    """A cluster that ends with the context; skips the test where something is missing."""
    os.environ["PATH"] += ":/usr/sbin:/sbin:/usr/local/go/bin"  # where daemons and Go lie, which not every PATH has
    if lacks := lacking():
        missing(lacks)
    if policies and shutil.which("ipset") is None:
        missing("no ipset on PATH, which enforces network policies")
    end_leftovers()
    evidence.collect_from(folder)
    name = f"{_PREFIX}{os.getpid()}-{_start_time(os.getpid())}-{next(_counter)}"
    cluster = Cluster(folder, name, nodes, operators, policies=policies)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _start_time(pid: int) -> str:
    """When a process started, in the kernel's ticks; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except FileNotFoundError:
        return ""
