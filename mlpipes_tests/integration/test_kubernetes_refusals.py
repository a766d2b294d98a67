"""What a real API server makes of wrong settings, missing rights and a cluster that lacks something: one message each.

Nothing is submitted: preflight says it, in seconds, and leaves nothing behind.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mlpipes.compute.kubernetes_doctor import RIGHTS, preflight
from mlpipes.compute.kubernetes_settings import KubernetesSettings
from mlpipes.errors import UserError
from mlpipes.scales import RayScaleConfig
from mlpipes_tests.cluster import conftest, queues, software
from mlpipes_tests.cluster.build import configuration
from mlpipes_tests.cluster.cluster import Cluster, kubernetes_cluster
from mlpipes_tests.cluster.conftest import Namespace
from mlpipes_tests.cluster.images import THIN
from mlpipes_tests.sandbox import free_port
from mlpipes_tests.waiting import until

pytestmark = pytest.mark.cluster
cluster, namespace = conftest.cluster, conftest.namespace
SCALE = RayScaleConfig.from_key("w2-b128-e12-g0")
OURS = "rayjobs,rayclusters,pods,services,secrets,configmaps,jobs"


@dataclass
class Site:
    """Settings that are right, a kubeconfig that lets everything, and a place to change both."""

    cluster: Cluster
    namespace: Namespace
    folder: Path
    monkeypatch: pytest.MonkeyPatch
    settings: dict[str, Any] = field(default_factory=dict)
    min_workers: int | None = None

    def __post_init__(self) -> None:
        store = {"claim": "store", "mount_path": str(self.namespace.store)}
        self.settings = {"namespace": self.namespace.name, "image": THIN, "store": store, "cpu_per_worker": "300m"}
        self.config = json.loads(self.cluster.kubeconfig.read_text())
        self.kubeconfig()

    @property
    def where(self) -> str:
        return f"--namespace={self.namespace.name}"

    def kubeconfig(self, text: str | None = None) -> None:
        """Write the kubeconfig, as it is now or as a text of any kind."""
        (path := self.folder / "kubeconfig").write_text(json.dumps(self.config) if text is None else text)
        self.monkeypatch.setenv("KUBECONFIG", str(path))

    def server(self, **changes: Any) -> None:
        """Change how the API server is reached."""
        self.config["clusters"][0]["cluster"] |= changes
        self.kubeconfig()

    def account(self, *rights: tuple[str, str, str]) -> None:
        """Be a service account with these rights in the namespace alone, and with those that everybody has."""
        kubectl, name = self.cluster.kubectl, "limited"
        kubectl("create", "serviceaccount", name, self.where)
        rules = [{"verbs": [verb], "apiGroups": [group], "resources": [kind]} for verb, group, kind in rights]
        metadata = {"name": name, "namespace": self.namespace.name}
        role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": metadata, "rules": rules}
        kubectl.apply(role)
        account = f"--serviceaccount={self.namespace.name}:{name}"
        kubectl("create", "rolebinding", name, self.where, f"--role={name}", account)
        self.token(kubectl("create", "token", name, self.where).strip())

    def token(self, token: str) -> None:
        """Be whoever bears a token."""
        self.config["users"][0]["user"] = {"token": token}
        self.kubeconfig()

    def claim(self, name: str, mode: str, *, bound: bool) -> None:
        """A claim, on a volume of its own or on one that is not there."""
        kubectl = self.cluster.kubectl
        if bound:
            kubectl.apply(software.volume(self.namespace.name, name, self.namespace.store, mode))
        spec = {"accessModes": [mode], "storageClassName": "", "volumeName": f"{self.namespace.name}-{name}"}
        spec |= {"resources": {"requests": {"storage": "1Gi"}}}
        metadata = {"name": name, "namespace": self.namespace.name}
        kubectl.apply({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec})
        if bound:
            holds: Callable[[Any], bool] = lambda found: found["status"]["phase"] == "Bound"  # noqa: E731
            kubectl.wait_for("pvc", name, holds, "is bound", namespace=self.namespace.name)
        self.settings["store"] |= {"claim": name}

    def queue(self, cpu: str = "8", **changes: Any) -> None:
        """A queue, changed."""
        manifests = queues.queue(self.namespace.name, {"cpu": cpu, "memory": "64Gi"})
        manifests[-1]["spec"] |= changes
        self.cluster.kubectl.apply(manifests)
        self.settings["queue"] = queues.NAME

        def told(found: Any) -> bool:
            return any(each["type"] == "Active" for each in found.get("status", {}).get("conditions", []))

        self.cluster.kubectl.wait_for("localqueue", queues.NAME, told, "is told of", namespace=self.namespace.name)

    def refusal(self) -> str:
        """What preflight says."""
        loaded = KubernetesSettings.model_validate(self.settings)
        with pytest.raises(UserError) as caught:
            preflight(loaded.of_scale(SCALE.key), SCALE, 0, self.min_workers)
        return str(caught.value)

    def things(self) -> str:
        return self.cluster.kubectl("get", OURS, self.where, "--ignore-not-found", "--output=name")


def _set(**changes: Any) -> Callable[[Site], None]:
    return lambda site: site.settings.update(changes)


def _without(right: tuple[str, str, str]) -> Callable[[Site], None]:
    return lambda site: site.account(*(each for each in RIGHTS if each != right))


def _elastic_without_patch(site: Site) -> None:
    site.account(*RIGHTS)
    site.min_workers = 1


def _queue_without_rights(site: Site) -> None:
    site.queue()
    site.account(*RIGHTS)


def _elastic_in_a_queue(site: Site) -> None:
    site.queue()
    site.min_workers = 1


def _owner_without_rights(site: Site) -> None:
    site.cluster.kubectl("create", "configmap", "release", site.where)
    site.settings["owner"] = "release"
    site.account(*RIGHTS)


def _expired(site: Site) -> None:
    """A token that nobody has given out, as one that has expired."""
    site.token("eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmVk")


def _cordoned(site: Site) -> None:
    site.settings["node_selector"] = {"kubernetes.io/hostname": "node-1"}
    site.cluster.kubectl("cordon", "node-1")


AWAY = "nowhere"
CASES: dict[str, tuple[Callable[[Site], None], str]] = {
    "no kubeconfig": (lambda site: site.monkeypatch.setenv("KUBECONFIG", "/no/such"), "the kubeconfig /no/such is of no"),
    "a kubeconfig that is empty": (lambda site: site.kubeconfig(""), "is of no use"),
    "a kubeconfig that is no YAML": (lambda site: site.kubeconfig("{"), "is of no use"),
    "a kubeconfig of another form": (lambda site: site.kubeconfig("[1]"), "is of no use"),
    "a context that is not there": (_set(context=AWAY), "is of no use"),
    "nobody listens": (lambda site: site.server(server=f"https://127.0.0.1:{free_port()}"), "does not answer"),
    "no such host": (lambda site: site.server(server="https://api.invalid:6443"), "does not answer"),
    "another authority": (lambda site: site.server(**{"certificate-authority": _other(site)}), "not one that the kube"),
    "an expired token": (_expired, "has a token expired? Log in again"),
    "no rights at all": (lambda site: site.account(), "we may not create rayjobs.ray.io; get rayjobs.ray.io;"),
    **{
        f"may not {verb} {kind}": (_without((verb, group, kind)), f"we may not {verb} {kind}{group and f'.{group}'}. `kube")
        for verb, group, kind in RIGHTS
    },
    "may not patch, and is elastic": (_elastic_without_patch, "we may not patch rayclusters.ray.io"),
    "may not see its queue": (_queue_without_rights, "we may not get localqueues.kueue.x-k8s.io; list workloads"),
    "may not see its owner": (_owner_without_rights, "we may not get configmaps"),
    "a namespace that is not there": (_set(namespace=AWAY), f"no PersistentVolumeClaim store in namespace {AWAY}"),
    "a claim that is not there": (lambda site: site.settings["store"].update(claim=AWAY), "get pvc` lists those"),
    "a claim that waits": (lambda site: site.claim("waits", "ReadWriteMany", bound=False), "the claim waits is Pending"),
    "a claim of one node": (lambda site: site.claim("one", "ReadWriteOnce", bound=True), "pods on several nodes cannot"),
    "a claim to read": (lambda site: site.claim("read", "ReadOnlyMany", bound=True), "the claim read is ReadOnlyMany"),
    "an owner that is not there": (_set(owner=AWAY), f"there is no ConfigMap {AWAY}. `kubectl"),
    "a queue that is not there": (_set(queue=AWAY), f"there is no LocalQueue {AWAY}. `kubectl"),
    "a queue that holds": (lambda site: site.queue(stopPolicy="Hold"), "LocalQueue training is stopped (Hold)"),
    "a queue that is drained": (lambda site: site.queue(stopPolicy="HoldAndDrain"), "is stopped (HoldAndDrain)"),
    "a queue of no queue": (lambda site: site.queue(clusterQueue=AWAY), "LocalQueue training is inactive"),
    "a queue that is too small": (lambda site: site.queue(cpu="1"), "its quota can never hold w2-b128-e12-g0 (cpu: 1.6"),
    "elastic in a queue": (_elastic_in_a_queue, "admits a training whole or not at all"),
    "nodes with no such label": (_set(node_selector={"pool": AWAY}), f"workers ask for (pool={AWAY})"),
    "spot nodes with no such label": (_set(spot={"node_selector": {"pool": AWAY}}), f"workers ask for (pool={AWAY})"),
    "no node may be used": (_cordoned, "no node has the labels"),
    "nodes that are too small": (_set(cpu_per_worker="64"), "a worker pod wants 64 of cpu, the largest node has"),
    "pods that are too large": (_set(cpu_per_worker="1", workers_per_pod=2, memory_per_worker="900Gi"), "of memory, the"),
    "memory that is too small": (_set(memory_per_worker="256Mi"), "Raise `memory_per_worker` (it is 256Mi)"),
}  # fmt: skip


def _other(site: Site) -> str:
    """The certificate of an authority that has not signed the API server's."""
    from mlpipes_tests.cluster.certificates import Authority

    return str(Authority(site.folder / "other", "other").certificate)


@pytest.fixture
def site(cluster: Cluster, namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    yield Site(cluster, namespace, tmp_path, monkeypatch)
    cluster.kubectl("uncordon", "node-1")
    cluster.kubectl("delete", *queues.of_cluster(namespace.name), "--wait=false", "--ignore-not-found")
    for name in ("one", "read"):
        volume = f"{namespace.name}-{name}"
        cluster.kubectl("delete", "persistentvolume", volume, "--wait=false", "--ignore-not-found")


@pytest.mark.parametrize("case", CASES)
def test_preflight_says_in_one_message_what_is_missing_and_leaves_nothing(site: Site, case: str) -> None:
    breaks, says = CASES[case]
    breaks(site)
    before, began = site.things(), time.process_time()
    said = site.refusal()
    assert says in said, said
    assert "Traceback" not in said
    assert said.endswith("Nothing was started."), said
    assert "eyJ" not in said, "a token"
    assert time.process_time() - began < 10, "CPU-seconds"
    assert site.things() == before


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 40


def test_a_good_site_passes(site: Site) -> None:
    site.account(*RIGHTS)
    preflight(KubernetesSettings.model_validate(site.settings), SCALE, 0)


def test_a_claim_that_is_bound_with_its_first_pod_passes(site: Site) -> None:
    kubectl, name = site.cluster.kubectl, f"late-{site.namespace.name}"
    late = {"provisioner": "kubernetes.io/no-provisioner", "volumeBindingMode": "WaitForFirstConsumer"}
    kubectl.apply({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": name}} | late)
    spec = {"accessModes": ["ReadWriteMany"], "storageClassName": name, "resources": {"requests": {"storage": "1Gi"}}}
    metadata = {"name": "late", "namespace": site.namespace.name}
    kubectl.apply({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec})
    site.settings["store"] |= {"claim": "late"}
    said = lambda: "WaitForFirstConsumer" in kubectl("get", "events", site.where, "--output=json")  # noqa: E731
    until(said, "the claim waits for a pod")
    site.account(*RIGHTS)
    preflight(KubernetesSettings.model_validate(site.settings), SCALE, 0)
    kubectl("delete", "storageclass", name)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster without any operator."""
    with kubernetes_cluster(tmp_path_factory.mktemp("bare"), nodes=1, operators=()) as started:
        yield started


def until_served(cluster: Cluster, version: str) -> None:
    """Wait until the API server says that it has RayJobs of a version: a moment after it has taken the definition."""
    said = ("get", f"--raw=/apis/ray.io/{version}")
    until(lambda: '"rayjobs"' in cluster.kubectl.tried(*said).stdout, f"RayJobs of {version} are served", every=0.5)


def test_a_cluster_without_kuberay_or_with_an_old_one_or_without_kueue_is_told(
    bare: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Namespace("t", tmp_path / "store")
    bare.kubectl.apply(software.namespace(made.name, made.store))
    site = Site(bare, made, tmp_path, monkeypatch)
    absent = "the cluster has no rayjobs.ray.io/v1: KubeRay is not installed. `helm repo add kuberay"
    assert absent in site.refusal()

    kinds = next((configuration("ray-operator").parent / "crd" / "bases").glob("*rayjobs.yaml")).read_text()
    old = bare.kubectl("create", "--dry-run=client", "-f", "-", "--output=json", text=kinds)
    definition = json.loads(old)
    definition["spec"]["versions"] = [v for v in definition["spec"]["versions"] if v["name"] == "v1alpha1"]
    definition["spec"]["versions"][0] |= {"storage": True, "served": True}
    bare.kubectl("create", "-f", "-", text=json.dumps(definition))
    until_served(bare, "v1alpha1")
    assert absent in site.refusal()
    bare.kubectl("delete", "crd", "rayjobs.ray.io")
    bare.kubectl("create", "-f", "-", text=kinds)
    until_served(bare, "v1")
    site.settings["queue"] = "training"
    assert "there is no Kueue for queue training. `helm install kueue" in site.refusal()
