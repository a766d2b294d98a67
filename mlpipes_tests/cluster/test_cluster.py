"""The test cluster is a real one: pods, DNS, volumes, operators, queues and faults; and nothing of it stays."""

import json
import sys
from typing import Any

import psutil
import pytest

from mlpipes_tests.cluster import addons, queues, software
from mlpipes_tests.cluster.cluster import Cluster
from mlpipes_tests.cluster.conftest import Namespace
from mlpipes_tests.cluster.kubectl import Manifest, has_condition, in_phase
from mlpipes_tests.cluster.nodes import CONTROL
from mlpipes_tests.waiting import until

pytestmark = pytest.mark.cluster


def pod(name: str, namespace: Namespace, command: list[str], **spec: Any) -> Manifest:
    metadata = {"name": name, "namespace": namespace.name, "labels": {"app": name}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": software.pod_spec(command) | spec}


def wait_for_pod(cluster: Cluster, namespace: Namespace, name: str, phase: str) -> Manifest:
    ended = {"Succeeded", "Failed"} - {phase}

    def vain() -> str:
        found = cluster.kubectl.find("pod", name, namespace.name)
        if found is None or found.get("status", {}).get("phase") not in ended:
            return cluster.died()
        return f"it ended: {cluster.kubectl.logs(name, namespace=namespace.name)}"

    return cluster.kubectl.wait_for("pod", name, in_phase(phase), f"is {phase}", namespace=namespace.name, vain=vain)


def test_nodes_are_ready_and_pods_of_different_nodes_meet(cluster: Cluster, namespace: Namespace) -> None:
    """Python of this host runs in a pod; a Service is found by its name and leads to the other node; volumes are shared."""
    kubectl, where = cluster.kubectl, f"--namespace={namespace.name}"
    nodes = {node["metadata"]["name"]: node for node in kubectl.objects("nodes")}
    assert set(nodes) == {CONTROL, "node-1", "node-2"}
    assert all(has_condition("Ready")(node) for node in nodes.values())
    (namespace.store / "page").write_text("from the store")
    serve = ["python", "-m", "http.server", "8000", "--directory", software.STORE]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "pages", "namespace": namespace.name},
        "spec": {"selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": 8000}]},
    }
    server = pod("server", namespace, serve, nodeName="node-1")
    server["spec"]["containers"][0]["readinessProbe"] = {"httpGet": {"path": "/page", "port": 8000}, "periodSeconds": 1}
    kubectl.apply([service, server])
    kubectl.wait_for("pod", "server", has_condition("Ready"), "is ready", namespace=namespace.name, vain=cluster.died)
    ask = (
        "import sys, pathlib, urllib.request as r, numpy;"
        "print(r.urlopen('http://pages/page').read().decode(), sys.version_info[:2], numpy.__version__);"
        f"pathlib.Path('{software.STORE}/answer').write_text('written by a pod')"
    )
    kubectl.apply(pod("asker", namespace, ["python", "-c", ask], nodeName="node-2"))
    wait_for_pod(cluster, namespace, "asker", "Succeeded")
    said = kubectl.logs("asker", namespace=namespace.name)
    assert said.startswith(f"from the store ({sys.version_info[0]}, {sys.version_info[1]})")
    assert kubectl.execute("server", "cat", f"{software.STORE}/answer", namespace=namespace.name) == "written by a pod"
    assert kubectl.execute("server", "id", "-u", namespace=namespace.name).strip() == "1000"
    refused = kubectl.tried("exec", "server", where, "--", "touch", f"{software.PROJECT}/x")
    assert "Read-only file system" in refused.stderr
    assert {"pod/server", "service/pages"} <= set(kubectl.everything(namespace.name))


def test_rights_are_enforced(cluster: Cluster, namespace: Namespace) -> None:
    """Pod security refuses a host path; a pod's own token may read nothing that its account was not given."""
    kubectl = cluster.kubectl
    forbidden = pod("host", namespace, ["true"], volumes=[{"name": "h", "hostPath": {"path": "/"}}])
    forbidden["spec"]["containers"][0]["volumeMounts"] = [{"name": "h", "mountPath": "/mnt"}]
    refused = kubectl.tried("apply", "-f", "-", text=json.dumps(forbidden))
    assert "violates PodSecurity" in refused.stderr
    account = f"--as=system:serviceaccount:{namespace.name}:default"
    assert kubectl.tried("auth", "can-i", "list", "pods", account).stdout.strip() == "no"
    ask = (
        "import ssl, pathlib, urllib.request as r, urllib.error\n"
        "at = pathlib.Path('/var/run/secrets/kubernetes.io/serviceaccount')\n"
        "call = r.Request('https://kubernetes.default.svc/api/v1/namespaces/default/pods',\n"
        "                 headers={'Authorization': 'Bearer ' + (at / 'token').read_text()})\n"
        "try: r.urlopen(call, context=ssl.create_default_context(cafile=at / 'ca.crt'))\n"
        "except urllib.error.HTTPError as e: print(e.code, e.read().decode())\n"
    )
    kubectl.apply(pod("curious", namespace, ["python", "-c", ask]))
    wait_for_pod(cluster, namespace, "curious", "Succeeded")
    said = kubectl.logs("curious", namespace=namespace.name)
    assert said.startswith("403")
    assert f"serviceaccount:{namespace.name}:default" in said


def ray_pod(cpu: str, memory: str) -> Manifest:
    spec = software.pod_spec(["unused"])
    del spec["restartPolicy"]
    container = spec["containers"][0]
    del container["command"]
    container["resources"] = {"requests": {"cpu": cpu, "memory": memory}, "limits": {"memory": memory}}
    container["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
    spec["volumes"].append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}})
    return {"spec": spec}


def test_ray_job_finishes(cluster: Cluster, namespace: Namespace) -> None:
    """KubeRay makes a head without CPUs and a worker, runs the entry point, and removes what it made."""
    entry = (
        "import ray; ray.init(); "
        "print('worked on', ray.get(ray.remote(lambda: ray.get_runtime_context().get_node_id()).remote()), "
        "len(ray.nodes()), ray.cluster_resources()['CPU'])"
    )
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": "small", "namespace": namespace.name},
        "spec": {
            "entrypoint": f'python -c "{entry}"',
            "submissionMode": "HTTPMode",
            "backoffLimit": 0,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 0,
            "rayClusterSpec": {
                "rayVersion": "2.60.0",
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},  # noqa: S104
                    "template": ray_pod("100m", "3Gi"),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "worker",
                        "replicas": 1,
                        "minReplicas": 1,
                        "maxReplicas": 1,
                        "rayStartParams": {"num-cpus": "1"},
                        "template": ray_pod("100m", "3Gi"),
                    }
                ],
            },
        },
    }
    cluster.kubectl.apply(job)
    found = cluster.kubectl.wait_for(
        "rayjob",
        "small",
        lambda job: job.get("status", {}).get("jobStatus") in ("SUCCEEDED", "FAILED", "STOPPED"),
        "has ended",
        namespace=namespace.name,
        vain=cluster.died,
    )
    assert found["status"]["jobStatus"] == "SUCCEEDED", found["status"]
    until(
        lambda: not cluster.kubectl.objects("rayclusters,pods", namespace.name),
        "the Ray cluster of a finished job is gone",
        every=1,
    )


def queued_job(name: str, namespace: Namespace, cpus: str) -> Manifest:
    # It ends when the test says so, by a file in the store.
    wait = f"until [ -e {software.STORE}/{name} ]; do sleep 1; done"
    spec = software.pod_spec(["sh", "-c", wait], resources={"requests": {"cpu": cpus}})
    labels = {queues.LABEL: queues.NAME}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": namespace.name, "labels": labels},
        "spec": {"template": {"spec": spec}, "backoffLimit": 0},
    }


def test_queue_admits_what_fits_and_suspends_the_rest(cluster: Cluster, namespace: Namespace) -> None:
    kubectl = cluster.kubectl
    at: Any = {"namespace": namespace.name, "vain": cluster.died}
    kubectl.apply(queues.queue(namespace.name, {"cpu": "500m"}))
    try:
        kubectl.apply(queued_job("first", namespace, "300m"))
        kubectl.wait_for("job", "first", lambda job: job.get("status", {}).get("ready"), "has a ready pod", **at)
        kubectl.apply(queued_job("second", namespace, "300m"))

        def waits() -> bool:
            conditions = [
                condition
                for workload in kubectl.objects("workloads.kueue.x-k8s.io", namespace.name)
                if workload["metadata"]["ownerReferences"][0]["name"] == "second"
                for condition in workload.get("status", {}).get("conditions", [])
            ]
            return any(c["type"] == "QuotaReserved" and "insufficient unused quota" in c["message"] for c in conditions)

        until(waits, "the second job waits for quota", vain=cluster.died, every=1)
        second = kubectl.find("job", "second", namespace.name)
        assert second is not None
        assert second["spec"]["suspend"] is True
        (namespace.store / "first").touch()
        (namespace.store / "second").touch()
        kubectl.wait_for("job", "second", has_condition("Complete"), "is complete", **at)
    finally:
        kubectl("delete", *queues.of_cluster(namespace.name), "--wait=false")


def test_cut_network_makes_a_node_unready_until_it_is_healed(cluster: Cluster) -> None:
    cluster.cut_network("node-2")
    try:
        cluster.wait_until_ready("node-2", ready=False)
        assert has_condition("Ready")(cluster.kubectl.find("node", "node-1") or {})
    finally:
        cluster.heal_network("node-2")
    cluster.wait_until_ready("node-2")


def test_crashed_kubelet_is_started_again(cluster: Cluster) -> None:
    kubelet = psutil.Process(cluster.nodes["node-1"].machine.processes["kubelet"].pid)
    (before,) = kubelet.children()
    name = before.name()
    before.kill()
    until(
        lambda: [c for c in kubelet.children() if c.name() == name and c != before], "another kubelet runs", every=0.2
    )
    assert cluster.died() == ""
    cluster.wait_until_ready("node-1")


def test_frozen_node_hangs_and_a_killed_one_comes_back(cluster: Cluster, namespace: Namespace) -> None:
    """Neither a frozen nor a killed node's pods do anything; a thawed one goes on where it was, a killed one starts anew."""
    count = (
        "import itertools, time, pathlib\n"
        "for n in itertools.count(): pathlib.Path('/store/n').write_text(str(n)); time.sleep(.05)"
    )
    cluster.kubectl.apply(pod("counter", namespace, ["python", "-c", count], nodeName="node-1", restartPolicy="Always"))
    counted = namespace.store / "n"

    def number() -> int:
        text = counted.read_text() if counted.exists() else ""
        return int(text or -1)

    until(lambda: number() > 5, "the pod counts", vain=cluster.died)
    cluster.freeze_node("node-1")
    try:
        frozen = number()
        cluster.wait_until_ready("node-1", ready=False)
        assert number() == frozen
    finally:
        cluster.thaw_node("node-1")
    until(lambda: number() > frozen, "the pod counts on")
    cluster.wait_until_ready("node-1")

    cluster.kill_node("node-1")
    killed = number()
    try:
        cluster.wait_until_ready("node-1", ready=False)
        assert number() == killed
    finally:
        cluster.start_node("node-1")
    cluster.wait_until_ready("node-1")
    counted.write_text("")
    until(lambda: number() > 0, "the pod counts again")


@pytest.mark.parametrize("program", ["etcd", "apiserver"])
def test_control_plane_comes_back_with_its_state(cluster: Cluster, namespace: Namespace, program: str) -> None:
    before = cluster.kubectl.find("namespace", namespace.name)
    assert before is not None
    cluster.kill_program(program)
    assert cluster.kubectl.tried("get", "namespaces", "--request-timeout=3s").returncode
    cluster.start_program(program)
    cluster.wait_for_api()
    after = cluster.kubectl.find("namespace", namespace.name)
    assert after is not None
    assert after["metadata"]["uid"] == before["metadata"]["uid"]


def test_killed_operator_is_replaced(cluster: Cluster) -> None:
    _, namespace = addons.OPERATORS[addons.RAY]

    def pods() -> set[str]:
        return {p["metadata"]["uid"] for p in cluster.kubectl.objects("pods", namespace)}

    before = pods()
    cluster.kill_operator(addons.RAY)
    until(lambda: pods() and not pods() & before, "the operator has a new pod", every=1)
    addons.wait_for_operator(cluster.kubectl, addons.RAY)
