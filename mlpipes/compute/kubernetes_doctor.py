"""What training on Kubernetes needs, looked at before anything is submitted, with the command that mends what is missing.

The preflight asks what a training needs and takes a second; the doctor says all of it, and sends a pod if it may.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpipes.compute.kubernetes_api import KUEUE, KubernetesApi, RefusedError
from mlpipes.compute.kubernetes_manifest import GROUP, PLURAL, VERSION, Attempt, ray_job, shape, training
from mlpipes.compute.kubernetes_reasons import Look, blocked, quantity
from mlpipes.compute.kubernetes_settings import SETTINGS_VARIABLE, KubernetesSettings
from mlpipes.compute.preflight import GIB, WORKER_BYTES
from mlpipes.errors import ConfigError, PreflightError, UserError
from mlpipes.scales import RayScaleConfig
from mlpipes.store.environment import value_of
from mlpipes.store.layout import Store
from mlpipes.store.recipe import Recipe
from mlpipes.store.training_job import TrainingJob

RIGHTS = (
    *((verb, GROUP, PLURAL) for verb in ("create", "get", "list", "delete")),
    *((verb, "", "pods") for verb in ("get", "list", "delete")),
    ("get", "", "pods/log"),
    ("list", "", "events"),
    ("get", "", "persistentvolumeclaims"),
)
"""What following a training takes: verb, group and kind."""
_PATIENCE_SECONDS, _PROBE_SECONDS = 15, 180


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    good: bool
    detail: str


def preflight(
    settings: KubernetesSettings, scale: RayScaleConfig, data_bytes: int, min_workers: int | None = None
) -> None:
    """Raises PreflightError, in one message, if a training of a scale is known not to be able to run."""
    missing = [
        f"{found.what}: {found.detail}" for found in needs(settings, scale, data_bytes, min_workers) if not found.good
    ]
    if missing:
        raise PreflightError(f"Kubernetes cannot train {scale.key}. {' '.join(missing)} Nothing was started.")


def needs(
    settings: KubernetesSettings, scale: RayScaleConfig, data_bytes: int = 0, min_workers: int | None = None
) -> Iterator[Finding]:
    """What a training of a scale needs of the cluster, one after the other; ends with what makes the rest moot."""
    api = KubernetesApi(settings, _PATIENCE_SECONDS)
    looks = (
        ("API server", lambda: _version(api)),
        ("KubeRay", lambda: _kuberay(api)),
        ("rights", lambda: _rights(api, min_workers)),
    )
    for what, look in looks:
        yield (found := _tried(what, look))
        if not found.good:
            return
    yield _tried("store", lambda: _claim(api))
    if settings.owner:
        yield _tried("owner", lambda: _owner(api))
    if settings.queue:
        yield _tried("queue", lambda: _queue(api, scale, min_workers))
    yield _tried("memory", lambda: _memory(settings, scale, data_bytes))
    yield _tried("nodes", lambda: _nodes(api, scale))


def examine_kubernetes(
    scales: Mapping[str, Sequence[RayScaleConfig]], store: Store, *, probe: bool
) -> Iterator[Finding]:
    """All that training the `scales` of each workload needs. `probe` sends a pod to a node; nothing is left behind."""
    try:
        path = value_of(SETTINGS_VARIABLE) or ""
        if not path:
            raise ConfigError(f"{SETTINGS_VARIABLE} is not set; set it to a YAML file as docs/kubernetes.md describes")
        settings = KubernetesSettings.load(Path(path))
        settings.check_store(store.root)
    except UserError as error:
        yield Finding("settings", False, str(error))
        return
    yield Finding("settings", True, path)
    said = set()
    for workload, offered in scales.items():
        for scale in offered:
            for found in needs(settings.of_scale(scale.key), scale):
                of_scale = found.what == "nodes" or (found.what == "memory" and not found.good)
                what = f"{workload} {scale.key}" if of_scale else found.what
                if (what, found.detail) not in said:
                    said.add((what, found.detail))
                    yield Finding(what, found.good, found.detail)
                if not found.good and found.what in ("API server", "KubeRay", "rights"):
                    return
    if probe:
        yield _tried("a pod", lambda: _probe(settings, store))
    else:
        yield Finding(
            "shared store", True, f"{store.root} must be on that claim here too; `--probe` sends a pod to see"
        )


# -- what is looked at ----------------------------------------------------------------------------------------------
def _version(api: KubernetesApi) -> str:
    return f"Kubernetes {api.request('GET', '/version')['gitVersion']}"


def _kuberay(api: KubernetesApi) -> str:
    served = api.find(f"/apis/{GROUP}/{VERSION}")
    if served is None or PLURAL not in {kind["name"] for kind in served["resources"]}:
        raise PreflightError(
            f"the cluster has no {PLURAL}.{GROUP}/{VERSION}: KubeRay is not installed. `helm repo add kuberay "
            "https://ray-project.github.io/kuberay-helm` and `helm install kuberay-operator kuberay/kuberay-operator "
            "--version 1.6.0 --namespace ray-system --create-namespace`."
        )
    return f"serves {PLURAL}.{GROUP}/{VERSION}"


def _rights(api: KubernetesApi, min_workers: int | None) -> str:
    space, rights = api.settings.namespace, [(*right, "") for right in RIGHTS]
    if min_workers is not None:  # begun with that many, it asks for the others
        rights.append(("patch", GROUP, "rayclusters", ""))
    if api.settings.queue:
        rights += [("get", KUEUE, "localqueues", ""), ("list", KUEUE, "workloads", "")]
    if api.settings.owner:
        rights.append(("get", "", "configmaps", api.settings.owner))
    lacking = [
        f"{verb} {kind}{f'.{group}' if group else ''}"
        for verb, group, kind, name in rights
        if not api.allows(verb, group, kind, name)
    ]
    if lacking:
        verbs = ",".join(dict.fromkeys(verb.partition(" ")[0] for verb in lacking))
        kinds = ",".join(dict.fromkeys(kind.partition(" ")[2] for kind in lacking))
        raise PreflightError(
            f"in namespace {space} we may not {'; '.join(lacking)}. `kubectl -n {space} create role mlpipes --verb={verbs} "
            f"--resource={kinds}` and `kubectl -n {space} create rolebinding mlpipes --role=mlpipes --serviceaccount=…` "
            "by somebody who may."
        )
    return f"all that is needed in namespace {space}"


def _claim(api: KubernetesApi) -> str:
    name, space = api.settings.store.claim, api.settings.namespace
    claim = api.find(api.core("persistentvolumeclaims", name))
    if claim is None:
        raise PreflightError(
            f"there is no PersistentVolumeClaim {name} in namespace {space}. `kubectl -n {space} get pvc` lists those that "
            "there are; name one in `store.claim`."
        )
    phase, modes = claim["status"].get("phase"), claim["spec"].get("accessModes", [])
    if phase != "Bound" and not _waits_for_a_pod(api, name):
        raise PreflightError(f"the claim {name} is {phase}. `kubectl -n {space} describe pvc {name}` says why.")
    if not {"ReadWriteMany"} & set(modes):
        raise PreflightError(
            f"the claim {name} is {', '.join(modes)}: pods on several nodes cannot share it. Use a ReadWriteMany one "
            "(NFS, CephFS, a managed file store)."
        )
    return f"claim {name}, {', '.join(modes)}, mounted at {api.settings.store.mount_path}"


def _waits_for_a_pod(api: KubernetesApi, claim: str) -> bool:
    """Whether a claim is of a storage class that binds it with its first pod, as Kubernetes says again and again."""
    about = f"involvedObject.kind=PersistentVolumeClaim,involvedObject.name={claim},reason=WaitForFirstConsumer"
    return bool(api.items(api.core("events"), fields=about))


def _owner(api: KubernetesApi) -> str:
    name, space = api.settings.owner or "", api.settings.namespace
    if api.find(api.core("configmaps", name)) is None:
        raise PreflightError(f"there is no ConfigMap {name}. `kubectl -n {space} create configmap {name}`.")
    return f"trainings are deleted with ConfigMap {name}"


def _queue(api: KubernetesApi, scale: RayScaleConfig, min_workers: int | None) -> str:
    name, space = api.settings.queue or "", api.settings.namespace
    if min_workers is not None:
        raise PreflightError(
            f"min_workers is {min_workers}, but queue {name} admits a training whole or not at all. Leave one of them out."
        )
    path = api.kueue("localqueues", name)
    if path is None:
        raise PreflightError(
            f"there is no Kueue for queue {name}. `helm install kueue oci://registry.k8s.io/kueue/charts/kueue --version "
            "0.17.0 -n kueue-system --create-namespace`, or leave `queue` out."
        )
    queue = api.find(path)
    if queue is None:
        raise PreflightError(
            f"there is no LocalQueue {name}. `kubectl -n {space} get localqueues` lists those that there are."
        )
    if (policy := queue["spec"].get("stopPolicy", "None")) != "None":
        raise PreflightError(
            f"LocalQueue {name} is stopped ({policy}). `kubectl -n {space} patch localqueue {name} --type merge -p "
            '\'{"spec":{"stopPolicy":"None"}}\'` by somebody who may.'
        )
    for condition in queue.get("status", {}).get("conditions", []):
        if condition["type"] == "Active" and condition["status"] == "False":
            raise PreflightError(
                f"LocalQueue {name} is inactive: {condition['message']}. `kubectl get clusterqueue "
                f"{queue['spec']['clusterQueue']} -o yaml` says more."
            )
    return f"LocalQueue {name} of ClusterQueue {queue['spec']['clusterQueue']}{_quota(api, queue, scale)}"


def _quota(api: KubernetesApi, queue: Mapping[str, Any], scale: RayScaleConfig) -> str:
    """Compare a queue's quota with a scale, where we may see it. Raises PreflightError if it can never be enough."""
    try:
        found = api.find(str(api.kueue("clusterqueues", queue["spec"]["clusterQueue"])))
    except RefusedError:
        return " (its quota is not for us to see)"
    spec = (found or {"spec": {}})["spec"]
    if spec.get("cohortName") or spec.get("cohort"):
        return " (which may borrow)"
    quota: dict[str, float] = {}
    for group in spec.get("resourceGroups", []):
        for resource in (resource for flavor in group["flavors"] for resource in flavor["resources"]):
            quota[resource["name"]] = quota.get(resource["name"], 0) + quantity(resource["nominalQuota"])
    short = [
        f"{name}: {amount:g} wanted, {quota[name]:g} in all"
        for name, amount in _wanted(api.settings, scale).items()
        if name in quota and amount > quota[name]
    ]
    if short:
        raise PreflightError(
            f"its quota can never hold {scale.key} ({'; '.join(short)}). Choose a smaller scale or another queue."
        )
    return ""


def _memory(settings: KubernetesSettings, scale: RayScaleConfig, data_bytes: int) -> str:
    needed = shape(scale, settings)
    has = quantity(settings.memory_per_worker) * needed.workers
    wants = WORKER_BYTES * needed.workers + data_bytes + quantity(settings.shared_memory) / 4
    if has < wants:
        raise PreflightError(
            f"a worker pod has {has / GIB:.1f} GiB, and {needed.workers} workers with the data want about {wants / GIB:.1f} "
            f"GiB. Raise `memory_per_worker` (it is {settings.memory_per_worker})."
        )
    return f"{has / GIB:.1f} GiB a pod"


def _nodes(api: KubernetesApi, scale: RayScaleConfig) -> str:
    """Compare the nodes with a scale's pods, where we may see them. Raises PreflightError if a pod fits on none."""
    settings, needed = api.settings, shape(scale, api.settings)
    pods = f"{needed.pods} worker pods with {needed.cpus:g} CPUs and {needed.gpus} GPUs each"
    if settings.autoscaled:
        return f"{pods}; nodes are made for them"
    if not api.allows("list", "", "nodes", everywhere=True):
        return f"{pods}; the nodes are not for us to see"
    nodes = [node for node in api.items("/api/v1/nodes") if not node["spec"].get("unschedulable")]
    selector = dict(settings.node_selector) | (dict(settings.spot.node_selector) if settings.spot else {})
    chosen = [n for n in nodes if all(n["metadata"]["labels"].get(key) == value for key, value in selector.items())]
    if not chosen:
        wanted = ", ".join(f"{key}={value}" for key, value in selector.items()) or "any"
        raise PreflightError(
            f"no node has the labels that workers ask for ({wanted}). `kubectl get nodes --show-labels` shows what there "
            "is; set `autoscaled: true` if nodes are made for pods that wait."
        )
    probe = _worker_pod(settings, scale)
    for name, amount in _requests(probe).items():
        largest = max(quantity(node["status"]["allocatable"].get(name, "0")) for node in chosen)
        if largest < amount:
            raise PreflightError(
                f"no node fits: a worker pod wants {amount:g} of {name}, the largest node has {largest:g}. Choose another "
                "scale, or fewer `workers_per_pod`, or set `autoscaled: true` if larger nodes are made for pods that wait."
            )
    return f"{pods} fit {len(chosen)} nodes by size"


# -- a scale's pods ---------------------------------------------------------------------------------------------------
def _manifest(settings: KubernetesSettings, scale: RayScaleConfig, store: str = "/") -> dict[str, Any]:
    recipe = Recipe(
        workload="probe",
        implementation="",
        snapshot="",
        scale=scale,
        hyperparameters={},
        seed=0,
        code="",
        generation="",
    )
    job = TrainingJob(recipe=recipe, store=store, attempt=1)
    return ray_job(Attempt("mlpipes-probe", 1, Path(store), {}, training(job)), scale, settings)["spec"][
        "rayClusterSpec"
    ]


def _worker_pod(settings: KubernetesSettings, scale: RayScaleConfig) -> dict[str, Any]:
    return _manifest(settings, scale)["workerGroupSpecs"][0]["template"]


def _requests(pod: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for container in pod["spec"]["containers"]:
        for name, amount in container["resources"]["requests"].items():
            found[name] = found.get(name, 0) + quantity(amount)
    return found


def _wanted(settings: KubernetesSettings, scale: RayScaleConfig) -> dict[str, float]:
    """All that a scale's pods ask for together, the head's with them."""
    cluster = _manifest(settings, scale)
    total = _requests(cluster["headGroupSpec"]["template"])
    group = cluster["workerGroupSpecs"][0]
    for name, amount in _requests(group["template"]).items():
        total[name] = total.get(name, 0) + amount * group["replicas"]
    return total


def _probe(settings: KubernetesSettings, store: Store) -> str:
    """Send a worker's pod: does it find what was written here, write where we see it, and import what a training needs?"""
    api = KubernetesApi(settings, _PATIENCE_SECONDS)
    if not api.allows("create", "", "pods"):
        raise PreflightError("the probe is a pod, and we may not create pods; `kubectl auth can-i create pods`.")
    store.root.mkdir(parents=True, exist_ok=True)
    name = f"mlpipes-probe-{os.getpid()}"
    ours, theirs = store.root / f"{name}.here", store.root / f"{name}.pod"
    program = (
        "import pathlib, platform, sys, mlpipes, ray, torch; ours, theirs = map(pathlib.Path, sys.argv[1:]); "
        "said = f'{ours.read_text()} {platform.node()}, Python {platform.python_version()}, Ray {ray.__version__}, torch "
        "{torch.__version__}'; theirs.write_text(said); print(said)"
    )
    pod = _worker_pod(settings, RayScaleConfig(workers=1, batch_size=1, epochs=1))
    container = pod["spec"]["containers"][0]
    container["command"] = ["/bin/sh", "-c", f'exec {settings.python} -c "$0" "$@"', program, str(ours), str(theirs)]
    del container["lifecycle"]
    pod["spec"] |= {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1}
    ours.write_text("read here:", encoding="utf-8")
    path = api.core("pods", name)
    try:
        api.request(
            "POST",
            api.core("pods"),
            body={"apiVersion": "v1", "kind": "Pod", **pod, "metadata": {**pod["metadata"], "name": name}},
        )
        return _probed(api, path, theirs)
    finally:
        api.delete(path)
        for witness in (ours, theirs):
            witness.unlink(missing_ok=True)


def _probed(api: KubernetesApi, path: str, witness: Path) -> str:
    deadline = time.monotonic() + _PROBE_SECONDS
    why = "it was not seen"
    while time.monotonic() < deadline:
        pod = api.find(path) or {"status": {"phase": "gone"}, "metadata": {}, "spec": {"containers": []}}
        phase = pod["status"].get("phase")
        if phase == "Succeeded":
            if witness.is_file():
                return witness.read_text(encoding="utf-8")
            raise PreflightError(f"a pod wrote {witness}, and here it is not: the claim is not what is mounted here.")
        if phase in ("Failed", "gone"):
            said = str(api.request("GET", f"{path}/log", {"tailLines": "5"})) if phase == "Failed" else phase
            raise PreflightError(f"a pod does not find the store or its Python: {' '.join(said.split())[-500:]}")
        empty = {"metadata": {}, "spec": {"rayClusterSpec": {}}}
        why = next((status.reason for status in blocked(Look(empty, [pod]))), f"its phase is {phase}")
        time.sleep(0.5)
    raise PreflightError(f"a pod did not run within {_PROBE_SECONDS} s: {why}")


def _tried(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, " ".join(look().split()))
    except (UserError, ConnectionError) as error:
        return Finding(what, False, str(error))
