"""What users install on a cluster, as pods: DNS, KubeRay's operator, Kueue and metrics-server, from their own manifests."""

import base64
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mlpipes_tests.cluster.build import configuration, program
from mlpipes_tests.cluster.certificates import Authority
from mlpipes_tests.cluster.images import program_image, thin_image
from mlpipes_tests.cluster.kubectl import Kubectl, Manifest, has_condition
from mlpipes_tests.cluster.machines import Network
from mlpipes_tests.cluster.nodes import CONTROL, CONTROL_TAINT, PAUSE

RAY, KUEUE, METRICS = "ray-operator", "kueue", "metrics-server"
OPERATORS = {
    RAY: ("kuberay-operator", "ray-system"),
    KUEUE: ("kueue-controller-manager", "kueue-system"),
    METRICS: ("metrics-server", "kube-system"),
}
"""Name and namespace of each operator's Deployment."""
OF_TRAINING = (RAY, KUEUE)
_DNS_IMAGE = "localhost/coredns:1"
_RAY_IMAGE, _RAY_TAG = "quay.io/kuberay/operator", "v1.6.0"
_KUEUE_IMAGE, _KUEUE_TAG = "registry.k8s.io/kueue/kueue", "v0.17.0"
_METRICS_IMAGE, _METRICS_TAG = "registry.k8s.io/metrics-server/metrics-server", "v0.9.0"
_KUEUE_WEBHOOKS = "kueue-webhook-service.kueue-system.svc"
_COREFILE = """\
.:53 {
  errors
  ready
  kubernetes cluster.local in-addr.arpa {
    pods insecure
  }
}
"""
_ON_CONTROL = {
    "nodeSelector": {"kubernetes.io/hostname": CONTROL},
    "tolerations": [CONTROL_TAINT | {"operator": "Exists"}],
}
"""Beside the control plane, so that a test may kill any other node and knows what it has killed."""


def make_images(folder: Path, operators: Collection[str]) -> dict[str, list[Path]]:
    """Archives of all images: what nodes need and, under `CONTROL`, what that one does."""
    folder.mkdir(parents=True)
    thin_image(folder / "thin.tar")
    program_image(folder / "pause.tar", PAUSE, program("pause"), "/pause")
    program_image(folder / "dns.tar", _DNS_IMAGE, program("dns"), "/coredns")
    images = {
        RAY: f"{_RAY_IMAGE}:{_RAY_TAG}",
        KUEUE: f"{_KUEUE_IMAGE}:{_KUEUE_TAG}",
        METRICS: f"{_METRICS_IMAGE}:{_METRICS_TAG}",
    }
    for operator in operators:
        program_image(folder / f"{operator}.tar", images[operator], program(operator), "/manager")
    return {
        "": [folder / "pause.tar", folder / "thin.tar"],
        CONTROL: [folder / f"{name}.tar" for name in ("pause", "thin", "dns", *operators)],
    }


def install_dns(kubectl: Kubectl, network: Network) -> None:
    """Install CoreDNS, without waiting for it."""
    labels = {"k8s-app": "kube-dns"}

    def named(kind: str, version: str = "v1", name: str = "coredns", **fields: Any) -> Manifest:
        metadata = {"name": name, "namespace": "kube-system", "labels": labels}
        return {"apiVersion": version, "kind": kind, "metadata": metadata} | fields

    rights = [
        {"apiGroups": [""], "resources": ["endpoints", "services", "pods", "namespaces"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    rbac = "rbac.authorization.k8s.io"
    container = {
        "name": "coredns",
        "image": _DNS_IMAGE,
        "args": ["-conf", "/etc/coredns/Corefile"],
        "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns", "readOnly": True}],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 2},
    }
    pod = {
        "serviceAccountName": "coredns",
        "dnsPolicy": "Default",
        "priorityClassName": "system-cluster-critical",
        # An unprivileged user serves port 53, as safe a way as any to let it.
        "securityContext": {"sysctls": [{"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"}]},
        "containers": [container],
        "volumes": [{"name": "config", "configMap": {"name": "coredns"}}],
    }
    ports = [{"name": name, "port": 53, "protocol": protocol} for name, protocol in (("dns", "UDP"), ("tcp", "TCP"))]
    kubectl.apply(
        [
            named("ServiceAccount"),
            named("ClusterRole", f"{rbac}/v1", rules=rights),
            named(
                "ClusterRoleBinding",
                f"{rbac}/v1",
                roleRef={"apiGroup": rbac, "kind": "ClusterRole", "name": "coredns"},
                subjects=[{"kind": "ServiceAccount", "name": "coredns", "namespace": "kube-system"}],
            ),
            named("ConfigMap", data={"Corefile": _COREFILE}),
            named(
                "Deployment",
                "apps/v1",
                spec={
                    "selector": {"matchLabels": labels},
                    "template": {"metadata": {"labels": labels}, "spec": pod | _ON_CONTROL},
                },
            ),
            named(
                "Service",
                name="kube-dns",
                spec={"selector": labels, "clusterIP": network.dns_service, "ports": ports},
            ),
        ]
    )


def install_operator(kubectl: Kubectl, folder: Path, operator: str) -> None:
    """Install an operator, without waiting for it."""
    {RAY: _install_kuberay, KUEUE: _install_kueue, METRICS: _install_metrics}[operator](kubectl, folder)


def _install_kuberay(kubectl: Kubectl, folder: Path) -> None:
    image = {"name": _RAY_IMAGE, "newName": _RAY_IMAGE, "newTag": _RAY_TAG}
    _kustomize(kubectl, folder, RAY, image)


def _install_kueue(kubectl: Kubectl, folder: Path) -> None:
    _, namespace = OPERATORS[KUEUE]
    kubectl.apply(_namespace(namespace))
    # The secret that Kueue would make itself, and then wait a minute for until its kubelet has mounted it.
    authority = Authority(folder / "kueue-certificates", "kueue-ca")
    authority.sign("tls", _KUEUE_WEBHOOKS, hosts=[_KUEUE_WEBHOOKS])
    files = {path.name: base64.b64encode(path.read_bytes()).decode() for path in authority.folder.iterdir()}
    metadata = {"name": "kueue-webhook-server-cert", "namespace": namespace}
    kubectl.apply({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": files})
    released = {"name": "us-central1-docker.pkg.dev/k8s-staging-images/kueue/kueue"}
    image = released | {"newName": _KUEUE_IMAGE, "newTag": _KUEUE_TAG}
    _kustomize(kubectl, folder, KUEUE, image)
    # kustomize's `namespace` moves this one, too, away from the role that it binds.
    group, reader = "rbac.authorization.k8s.io", "extension-apiserver-authentication-reader"
    kubectl.apply(
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": {"name": "kueue-visibility-server-auth-reader", "namespace": "kube-system"},
            "roleRef": {"apiGroup": group, "kind": "Role", "name": reader},
            "subjects": [{"kind": "ServiceAccount", "name": "kueue-controller-manager", "namespace": namespace}],
        }
    )


def _install_metrics(kubectl: Kubectl, folder: Path) -> None:
    released = {"name": "gcr.io/k8s-staging-metrics-server/metrics-server"}
    image = released | {"newName": _METRICS_IMAGE, "newTag": _METRICS_TAG}
    # By default it knows no authority that could have signed kubelets' certificates; here, the API server's has.
    trust = "--kubelet-certificate-authority=/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"
    _kustomize(kubectl, folder, METRICS, image, {"/containers/0/args/-": trust})


def wait_for_dns(kubectl: Kubectl) -> None:
    """Wait until CoreDNS answers."""
    kubectl.wait_for("deployment", "coredns", has_condition("Available"), "is available", namespace="kube-system")


def wait_for_operator(kubectl: Kubectl, operator: str) -> None:
    """Wait until an operator does its work."""
    name, namespace = OPERATORS[operator]
    kubectl.wait_for("deployment", name, has_condition("Available"), "is available", namespace=namespace)


def _namespace(name: str) -> Manifest:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def _kustomize(
    kubectl: Kubectl, folder: Path, operator: str, image: Manifest, more: Mapping[str, str] | None = None
) -> None:
    """Apply a release's own configuration with our namespace, image and node, and more values in its pods."""
    values = {f"/{key}": value for key, value in _ON_CONTROL.items()}
    values |= {"/containers/0/imagePullPolicy": "IfNotPresent", **(more or {})}
    operations = [{"op": "add", "path": f"/spec/template/spec{at}", "value": value} for at, value in values.items()]
    _, namespace = OPERATORS[operator]
    overlay = folder / namespace
    overlay.mkdir()
    document = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": namespace,
        "resources": [os.path.relpath(configuration(operator), overlay)],
        "images": [image],
        "patches": [{"target": {"kind": "Deployment"}, "patch": json.dumps(operations)}],
    }
    (overlay / "kustomization.yaml").write_text(json.dumps(document))
    kubectl.apply(_namespace(namespace))
    kubectl("apply", "--server-side", "--force-conflicts", "-k", str(overlay))
