"""A node of a cluster: a machine with containerd, kubelet and kube-proxy of its own."""

import json
from pathlib import Path

from mlpipes_tests.cluster.build import program
from mlpipes_tests.cluster.certificates import Authority
from mlpipes_tests.cluster.control_plane import GRACE_SECONDS, ControlPlane
from mlpipes_tests.cluster.machines import DISK, Machine, Network
from mlpipes_tests.waiting import until

CONTROL = "control"
"""The node beside the control plane; only what tolerates its taint runs there."""
CONTROL_TAINT = {"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}
PAUSE = "localhost/pause:1"
PLUGINS = Path("/usr/lib/cni")
_SOCKET = "/run/containerd.sock"
_CONTAINERD = """\
version = 2
root = "{disk}/containerd"
state = "/run/containerd-state" # which a restart of the machine forgets
[grpc]
  address = "{socket}"
[ttrpc]
  address = "{socket}.ttrpc"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true # root without CAP_SYS_RESOURCE may not lower it
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{disk}/cni"
"""


class Node:
    """A node on a machine that runs and is connected."""

    def __init__(self, machine: Machine, number: int, network: Network) -> None:
        self.machine, self.number, self.network = machine, number, network
        self.name, self.folder = machine.name, machine.folder
        self.address = network.address(number)

    def configure(self, plane: ControlPlane, authority: Authority) -> None:
        """Write all configuration files; once in its life."""
        certificate = authority.sign(f"kubelet-{self.name}", self.name, hosts=[self.name, self.address])
        self._identity = plane.kubeconfig(f"node-{self.name}", f"system:node:{self.name}", ["system:nodes"])
        self._proxy_identity = plane.kubeconfig(f"proxy-{self.name}", "system:kube-proxy")
        self._firewall_identity = plane.kubeconfig(f"firewall-{self.name}", "firewall", ["system:masters"])
        text = _CONTAINERD.format(disk=DISK, socket=_SOCKET, pause=PAUSE, plugins=PLUGINS)
        (self.folder / "containerd.toml").write_text(text)
        (self.folder / "cni").mkdir()
        (self.folder / "cni" / "pods.conflist").write_text(json.dumps(self._pod_network()))
        (self.folder / "resolv.conf").write_text("")
        (self.folder / "kubelet.json").write_text(json.dumps(self._kubelet(authority, certificate), indent=2))

    def start_containerd(self) -> None:
        """Start containerd, which needs nothing of the cluster."""
        self.machine.spawn("containerd", "containerd", "--config", str(self.folder / "containerd.toml"))

    def import_images(self, images: list[Path]) -> None:
        """Wait for containerd and load images into it."""
        socket = Path(f"/proc/{self.machine.pid}/root{_SOCKET}")
        until(socket.exists, f"containerd of {self.name} listens", vain=self.machine.died)
        for image in images:
            self.machine.run("ctr", f"--address={_SOCKET}", "--namespace=k8s.io", "images", "import", str(image))

    def start_kubelet(self) -> None:
        """Start kubelet and kube-proxy, which need the API server."""
        kube = str(program("kube"))
        self.machine.spawn(
            *("kubelet", kube, "kubelet"),
            f"--config={self.folder / 'kubelet.json'}",
            f"--kubeconfig={self._identity}",
            f"--root-dir={DISK / 'kubelet'}",
            f"--hostname-override={self.name}",
            f"--node-ip={self.address}",
            tries=5,  # as under systemd: one may crash as it starts, of a race in wiping resource slices (seen, 1.34.4)
        )
        self.machine.spawn(
            *("proxy", kube, "proxy"),
            f"--kubeconfig={self._proxy_identity}",
            f"--hostname-override={self.name}",
            f"--cluster-cidr={self.network.pods}",
            # These are the whole host's, not a network namespace's: leave them.
            *("--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0"),
            "--conntrack-tcp-timeout-close-wait=0",
        )

    def start_firewall(self) -> None:
        """Start kube-router as what it also is: the agent that enforces network policies, by rules of iptables.

        The node has to be known to the API server.
        """
        self.machine.spawn(
            *("firewall", str(program("kube-router"))),
            *("--run-firewall=true", "--run-router=false", "--run-service-proxy=false"),
            *(f"--kubeconfig={self._firewall_identity}", f"--hostname-override={self.name}"),
            f"--service-cluster-ip-range={self.network.services}",
        )

    def _pod_network(self) -> dict[str, object]:
        # Every pod has a cable of its own to its node, no bridge: all that comes and goes passes kube-proxy's rules.
        addresses = {
            "type": "host-local",
            "ranges": [[{"subnet": self.network.pods_of(self.number)}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(DISK / "cni-addresses"),
        }
        plugins = [{"type": "ptp", "ipam": addresses}, {"type": "portmap", "capabilities": {"portMappings": True}}]
        return {"cniVersion": "0.4.0", "name": "pods", "plugins": plugins}

    def _kubelet(self, authority: Authority, certificate: Path) -> dict[str, object]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(authority.certificate)},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(certificate),
            "tlsPrivateKeyFile": str(certificate.with_suffix(".key")),
            "registerWithTaints": [CONTROL_TAINT] if self.name == CONTROL else [],
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.machine.group.path}",
            "containerRuntimeEndpoint": f"unix://{_SOCKET}",
            "clusterDNS": [self.network.dns_service],
            "clusterDomain": "cluster.local",
            "resolvConf": str(DISK / "resolv.conf"),
            "podLogsDir": str(DISK / "pod-logs"),
            "volumePluginDir": str(DISK / "volume-plugins"),
            "failSwapOn": False,
            "nodeStatusUpdateFrequency": f"{GRACE_SECONDS // 4}s",
            "nodeLeaseDurationSeconds": GRACE_SECONDS,
            # The disk is the host's, which may be nearly full for reasons that are no node's.
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "imageGCHighThresholdPercent": 100,
        }
