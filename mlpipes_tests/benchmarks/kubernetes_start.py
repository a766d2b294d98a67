"""Benchmark: from a RayJob's creation to its first step on a real Kubernetes, by parts, beside the same by bare Ray Train.

Run as root as `python -m mlpipes_tests.benchmarks.kubernetes_start [ROUNDS]`: digits on one and two workers, in turns on a
cluster of two nodes that is up, after one round that is not counted. The bare one is the very same RayJob with another
entry point. Kubernetes' own times are whole seconds.
"""

import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from mlpipes.store.messages import Started, read_messages
from mlpipes_tests.benchmarks import bare_ray
from mlpipes_tests.benchmarks.figures import record
from mlpipes_tests.cluster.cluster import Cluster, kubernetes_cluster
from mlpipes_tests.cluster.conftest import Namespace, make_namespace
from mlpipes_tests.cluster.kubectl import Manifest
from mlpipes_tests.cluster.trainings import LATE, Training
from mlpipes_tests.waiting import until

_numbers = count()
Parts = dict[str, float]
"""Seconds since the RayJob's creation."""
FIRST = "first step"


def ours(cluster: Cluster, folder: Path, scale: str) -> tuple[Parts, Manifest]:
    """A training of ours in a namespace and a store of its own; its parts, and the RayJob that was made."""
    training = Training(cluster, _namespace(cluster, folder), scale)
    training.barriers.close(LATE)
    run = training.run()
    training.until_barrier(LATE)
    made = cluster.kubectl.find("rayjob", training.job(), training.namespace.name)
    assert made is not None
    parts = _of_pods(training.pods("head") + training.pods("worker"), made)
    training.barriers.open()
    assert training.end(run) == 0, training.log()[-3000:]
    created, messages = _time(made["metadata"]["creationTimestamp"]), read_messages(training.folder().messages(1))[0]
    parts["workers train"] = next(each.time for each in messages if isinstance(each, Started)) - created
    first = next(at for name, _, _, at in training.outcome()["history"] if name == "train/loss") / 1000
    return parts | {FIRST: first - created}, made


def bare(cluster: Cluster, folder: Path, scale: str, like: Manifest) -> Parts:
    """The same RayJob, whose entry point is bare Ray Train's."""
    made, (workers, batch, epochs) = _namespace(cluster, folder), (part[1:] for part in scale.split("-")[:3])
    place = made.store / "bare"
    place.mkdir()
    place.chmod(0o777)
    spec = json.loads(json.dumps(like["spec"]).replace(like["metadata"]["namespace"], made.name))
    spec = json.loads(json.dumps(spec).replace(str(_store_of(like)), str(made.store)))
    spec["entrypoint"] = shlex.join([sys.executable, bare_ray.__file__, workers, batch, epochs, str(place)])
    # Ours is itself the only worker, whose place it asks for; TorchTrainer's is another process.
    for key in ("jobId", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "entrypointNumCpus"):
        spec.pop(key, None)
    metadata = {"name": "bare", "namespace": made.name}
    cluster.kubectl.apply({"apiVersion": like["apiVersion"], "kind": "RayJob", "metadata": metadata, "spec": spec})
    until((place / "times.json").exists, "it has trained", every=0.5)
    job = cluster.kubectl.find("rayjob", "bare", made.name)
    assert job is not None
    pods = cluster.kubectl.objects("pods", made.name, selector="ray.io/node-type")
    times = json.loads((place / "times.json").read_text(encoding="utf-8"))
    parts = _of_pods(pods, job) | {FIRST: times["first"] - _time(job["metadata"]["creationTimestamp"])}
    cluster.kubectl("delete", "rayjob", "bare", f"--namespace={made.name}")
    return parts


def _namespace(cluster: Cluster, folder: Path) -> Namespace:
    return make_namespace(cluster, f"start{next(_numbers)}", folder / f"{time.time_ns()}")


def _store_of(job: Manifest) -> Path:
    containers = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    return Path(next(mount["mountPath"] for mount in containers[0]["volumeMounts"] if mount["name"] == "store"))


def _of_pods(pods: list[Manifest], job: Manifest) -> Parts:
    """When the last of the pods was where, and when KubeRay submitted."""

    def condition(kind: str) -> float:
        found = [
            each["lastTransitionTime"] for pod in pods for each in pod["status"]["conditions"] if each["type"] == kind
        ]
        return max(map(_time, found)) - created

    created = _time(job["metadata"]["creationTimestamp"])
    running = [pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"] for pod in pods]
    submitted = job["status"].get("rayJobStatusInfo", {}).get("startTime")
    parts = {"pods have nodes": condition("PodScheduled"), "containers run": max(map(_time, running)) - created}
    parts["Ray's nodes are ready"] = condition("Ready")
    return parts | ({"the job has begun": _time(submitted) - created} if submitted else {})


def _time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def main(rounds: int) -> int:
    """Measure and print; returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="mlpipes-start-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        folder.chmod(0o755)
        with kubernetes_cluster(folder / "cluster") as cluster:
            for workers in (2, 1):
                scale = f"w{workers}-b128-e10-g0"
                found: dict[str, list[Parts]] = {"mlpipes": [], "bare Ray Train": []}
                for number in range(rounds + 1):
                    parts, made = ours(cluster, folder, scale)
                    sides = {"mlpipes": parts, "bare Ray Train": bare(cluster, folder, scale, made)}
                    for name, measured in sides.items():
                        print(
                            workers,
                            name,
                            number,
                            {what: round(value, 1) for what, value in measured.items()},
                            flush=True,
                        )
                        if number:  # the first round reads programs from the disk
                            found[name].append(measured)
                _show(workers, found)
    return 0


def _show(workers: int, found: dict[str, list[Parts]]) -> None:
    middle: Callable[[str, str], Any] = lambda name, part: statistics.median(  # noqa: E731
        parts.get(part, float("nan")) for parts in found[name]
    )
    print(
        f"\n| {workers} worker(s), seconds since the RayJob's creation, median of {len(found['mlpipes'])} | mlpipes | bare |"
    )
    print("| --- | --- | --- |")
    for part in found["mlpipes"][0]:
        print(f"| {part} | {middle('mlpipes', part):.1f} | {middle('bare Ray Train', part):.1f} |")
    for name in found:
        record(
            f"Kubernetes, {workers} workers, {name}, to the first step", "s", [parts[FIRST] for parts in found[name]]
        )
    print(f"| mlpipes ÷ bare | {middle('mlpipes', FIRST) / middle('bare Ray Train', FIRST):.2f} | |", flush=True)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5))
