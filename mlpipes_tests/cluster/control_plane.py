"""The control plane of a cluster: etcd, API server, controllers and scheduler, each a program that can be killed alone."""

import json
from collections.abc import Sequence
from pathlib import Path

from mlpipes_tests.cluster.build import program
from mlpipes_tests.cluster.certificates import Authority
from mlpipes_tests.cluster.machines import Machine, Network

_ETCD = "http://127.0.0.1:2379"
_API_PORT = 6443
GRACE_SECONDS = 16
"""So long after a node's last word it counts as lost; 40 by default, which tests would only wait for."""


class ControlPlane:
    """What runs on the first machine; `start` may be called again for a program that was killed."""

    def __init__(self, machine: Machine, network: Network, authority: Authority) -> None:
        self.machine, self.network, self.authority = machine, network, authority
        self.folder = machine.folder
        self.server = f"https://{network.address(0)}:{_API_PORT}"
        hosts = ["localhost", "127.0.0.1", network.address(0), network.api_service]
        hosts += ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"]
        self._serving = authority.sign("apiserver", "kube-apiserver", hosts=hosts)
        self._to_kubelet = authority.sign("apiserver-to-kubelet", "kube-apiserver", groups=["system:masters"])
        self._proxy = authority.sign("front-proxy", "front-proxy-client")
        authority.key_pair("tokens")
        self.commands = {
            "etcd": self._etcd(),
            "apiserver": self._apiserver(),
            "controllers": self._controllers(),
            "scheduler": self._scheduler(),
        }

    def start(self, name: str) -> None:
        """Start one of `etcd`, `apiserver`, `controllers` and `scheduler`."""
        self.machine.spawn(name, *self.commands[name])

    def kubeconfig(self, name: str, user: str, groups: Sequence[str] = ()) -> Path:
        """A file that lets a client in as a user of these groups."""
        certificate = self.authority.sign(f"client-{name}", user, groups=list(groups))
        path = self.authority.folder / f"{name}.kubeconfig"
        cluster = {"server": self.server, "certificate-authority": str(self.authority.certificate)}
        identity = {"client-certificate": str(certificate), "client-key": str(certificate.with_suffix(".key"))}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": user, "user": identity}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
            "current-context": "test",
        }
        path.write_text(json.dumps(document, indent=2))
        path.chmod(0o600)
        return path

    def _etcd(self) -> list[str]:
        return [
            str(program("etcd")),
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={_ETCD}",
            f"--advertise-client-urls={_ETCD}",
            "--unsafe-no-fsync",  # a killed process loses nothing by it, only a killed machine would
            "--log-level=warn",
        ]

    def _apiserver(self) -> list[str]:
        keys = self.authority.folder
        return [
            *(str(program("kube")), "apiserver"),
            f"--etcd-servers={_ETCD}",
            f"--advertise-address={self.network.address(0)}",
            f"--secure-port={_API_PORT}",
            f"--service-cluster-ip-range={self.network.services}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
            f"--tls-cert-file={self._serving}",
            f"--tls-private-key-file={self._serving.with_suffix('.key')}",
            f"--client-ca-file={self.authority.certificate}",
            f"--kubelet-certificate-authority={self.authority.certificate}",
            f"--kubelet-client-certificate={self._to_kubelet}",
            f"--kubelet-client-key={self._to_kubelet.with_suffix('.key')}",
            "--kubelet-preferred-address-types=InternalIP",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={keys / 'tokens.pub'}",
            f"--service-account-signing-key-file={keys / 'tokens.key'}",
            f"--requestheader-client-ca-file={self.authority.certificate}",
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--proxy-client-cert-file={self._proxy}",
            f"--proxy-client-key-file={self._proxy.with_suffix('.key')}",
        ]

    def _controllers(self) -> list[str]:
        keys = self.authority.folder
        return [
            *(str(program("kube")), "controllers"),
            f"--kubeconfig={self.kubeconfig('controllers', 'system:kube-controller-manager')}",
            f"--service-account-private-key-file={keys / 'tokens.key'}",
            f"--root-ca-file={self.authority.certificate}",
            f"--cluster-signing-cert-file={self.authority.certificate}",
            f"--cluster-signing-key-file={keys / 'ca.key'}",
            "--use-service-account-credentials=true",
            f"--node-monitor-grace-period={GRACE_SECONDS}s",
            "--leader-elect=false",  # there is one; a new one need not wait for the old one's lease
        ]

    def _scheduler(self) -> list[str]:
        configuration = self.kubeconfig("scheduler", "system:kube-scheduler")
        return [str(program("kube")), "scheduler", f"--kubeconfig={configuration}", "--leader-elect=false"]
