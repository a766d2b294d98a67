"""A large Kubernetes: 1,000 nodes that are only played (by KWOK), 500 RayJobs, some of them admitted; 200 are followed.

Run as root as `python -m mlpipes_tests.benchmarks.kubernetes_crowd [MINUTES]`, 10 by default; a real API server, KubeRay and
Kueue, whose pods run on nodes that are real. Counted is what our followers ask the API server, and timed what a user waits
for: `mlpipes status` and the look before a training. Nothing trains: the played pods run nothing.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from mlpipes.compute.jobs import JobHandle
from mlpipes.compute.kubernetes import KubernetesJobs
from mlpipes.compute.kubernetes_api import KubernetesApi
from mlpipes.compute.kubernetes_settings import KubernetesSettings
from mlpipes.scales import RayScaleConfig
from mlpipes.store.layout import TrainingFolder
from mlpipes_tests.benchmarks.figures import record
from mlpipes_tests.cluster import build, queues, software
from mlpipes_tests.cluster.cluster import Cluster, kubernetes_cluster
from mlpipes_tests.cluster.images import THIN
from mlpipes_tests.cluster.kubectl import Manifest
from mlpipes_tests.sandbox import CHECKOUT
from mlpipes_tests.training.harness import make_job
from mlpipes_tests.waiting import until

NODES, JOBS, FOLLOWED, ADMITTED = 1000, 500, 200, 100
SCALE, NAMESPACE = "w2-b128-e30-g0", "crowd"
PLAYED = {"type": "kwok"}


def _node(number: int) -> Manifest:
    offers = {"cpu": "32", "memory": "256Gi", "pods": "110"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": f"played-{number}",
            "labels": PLAYED,
            "annotations": {"kwok.x-k8s.io/node": "fake", "node.alpha.kubernetes.io/ttl": "0"},
        },
        "spec": {"taints": [{"key": "kwok", "effect": "NoSchedule"}]},
        "status": {"allocatable": offers, "capacity": offers},
    }


def _player(cluster: Cluster) -> list[str]:
    stages = build.configuration("kwok")
    files = ["node/fast/node-initialize", "node/heartbeat-with-lease/node-heartbeat-with-lease", "pod/fast/pod-ready"]
    return [
        str(build.program("kwok")),
        f"--kubeconfig={cluster.kubeconfig}",
        "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
        "--node-lease-duration-seconds=40",
        *(f"--config={stages / file}.yaml" for file in [*files, "pod/fast/pod-delete"]),
    ]


class Requests:
    """Counts what this process asks the API server, by the minute."""

    def __init__(self) -> None:
        self.began, self.lock = time.monotonic(), threading.Lock()
        self.asked, self.watches = Counter[int](), Counter[int]()
        original = KubernetesApi._call

        def counting(api: KubernetesApi, method: str, path: str, query: Any, *more: Any) -> Any:
            with self.lock:
                kind = self.watches if "watch" in query else self.asked
                kind[int((time.monotonic() - self.began) / 60)] += 1
            return original(api, method, path, query, *more)

        changed: Any = KubernetesApi
        changed._call = counting

    def a_second(self, minute: int) -> float:
        """How many there were in a minute, by the second, watches that begin among them."""
        return (self.asked[minute] + self.watches[minute]) / 60


def _followed(jobs: KubernetesJobs, handle: JobHandle, folder: TrainingFolder, ended: threading.Event) -> None:
    for _ in jobs.follow(handle, folder):
        if ended.is_set():
            return


def _settings(folder: Path) -> dict[str, Any]:
    return {
        "namespace": NAMESPACE,
        "image": THIN,
        "image_pull_policy": "IfNotPresent",
        "store": {"claim": "store", "mount_path": str(folder)},
        "queue": queues.NAME,
        "node_selector": PLAYED,
        "tolerations": [{"key": "kwok", "operator": "Exists"}],
        "run_as_user": 1000,
        "head_cpu": "100m",
        "cpu_per_worker": "300m",
        "memory_per_worker": "3Gi",
    }


def _timed(what: str, function: Any) -> float:
    began = time.perf_counter()
    function()
    took = time.perf_counter() - began
    print(f"{what}: {took:.2f} s", flush=True)
    return took


def crowd(cluster: Cluster, player: "subprocess.Popen[bytes]", home: Path, minutes: int) -> None:
    """Fill a cluster, follow, and print what it takes."""
    cluster.kubectl.apply(software.namespace(NAMESPACE, home))
    cluster.kubectl.apply(queues.queue(NAMESPACE, {"cpu": f"{ADMITTED * 0.7:g}", "memory": "10Ti"}))
    cluster.kubectl.apply(_node(number) for number in range(NODES))
    file = home / "kubernetes.yaml"
    file.write_text(yaml.safe_dump(_settings(home)))
    environment = {"KUBECONFIG": str(cluster.kubeconfig), "MLPIPES_KUBERNETES": str(file), "MLPIPES_HOME": str(home)}
    scale, settings = RayScaleConfig.from_key(SCALE), KubernetesSettings.load(file)
    begin, handles = time.monotonic(), list[tuple[JobHandle, TrainingFolder]]()
    for seed in range(JOBS):
        job = make_job(home / "store", SCALE, seed=seed)
        handles.append((KubernetesJobs(settings, scale).attach_or_submit(job), job.folder))
    print(f"{JOBS} RayJobs submitted in {time.monotonic() - begin:.0f} s", flush=True)

    def placed() -> bool:
        pods = cluster.kubectl.objects("pods", NAMESPACE, selector="ray.io/node-type=head")
        return sum(pod["status"].get("phase") == "Running" for pod in pods) >= ADMITTED

    def vain() -> str:
        return "the player has ended" if player.poll() is not None else cluster.died()

    until(placed, f"{ADMITTED} heads are played", vain=vain, every=5)
    requests, ended = Requests(), threading.Event()
    threads = [
        threading.Thread(target=_followed, args=(KubernetesJobs(settings, scale), *handles[number], ended))
        # Of those that are admitted and of those that wait, as many.
        for number in (*range(FOLLOWED // 2), *range(JOBS - FOLLOWED // 2, JOBS))
    ]
    try:
        for thread in threads:
            thread.start()
        for minute in range(minutes):
            time.sleep(max(0.0, requests.began + 60 * (minute + 1) - time.monotonic()))
            print(
                f"minute {minute + 1}: {requests.a_second(minute):.1f} requests/s of {FOLLOWED} followers", flush=True
            )
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    record("200 trainings followed on Kubernetes", "requests a second", [requests.a_second(minutes - 1)])
    took = _timed("the look before a training", lambda: KubernetesJobs(settings, scale).check(scale, 1 << 20))
    record("look before a training, 1,000 nodes", "seconds", [took])
    program = [str(CHECKOUT / ".venv/bin/mlpipes"), "status"]
    took = _timed(
        "`mlpipes status`",
        lambda: subprocess.run(program, env=os.environ | environment, check=True, capture_output=True),
    )
    record("`mlpipes status`, 500 trainings", "seconds", [took])


def main() -> None:
    """Print how many requests a second there were, minute by minute, and what a user waits for."""
    minutes = int(sys.argv[1]) if sys.argv[1:] else 10
    with tempfile.TemporaryDirectory() as folder, kubernetes_cluster(Path(folder) / "k8s") as cluster:
        home = Path(folder) / "home"
        os.environ |= {"KUBECONFIG": str(cluster.kubeconfig)}
        with (Path(folder) / "kwok.log").open("wb") as log:
            player = subprocess.Popen(_player(cluster), stdout=log, stderr=log)
        try:
            crowd(cluster, player, home, minutes)
        finally:
            player.kill()
            player.wait()


if __name__ == "__main__":
    main()
