"""Preflight: whether a cluster and the disk can hold a training, asked before anything is started."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpipes.compute.address import RayAddress, as_given
from mlpipes.errors import PreflightError
from mlpipes.scales import RayScaleConfig

GIB = 1024**3
WORKER_BYTES = int(0.9 * GIB)
"""Memory of a worker process besides the data: Python, torch and Ray; 0.86 GiB was measured while digits trained."""
FREE_DISK_BYTES = GIB
_SECONDS = 8


@dataclass(frozen=True)
class Node:
    """What one node of a cluster offers in all."""

    name: str
    cpus: float
    gpus: float
    memory_bytes: float

    def __str__(self) -> str:
        return f"{self.name}: {self.cpus:g} CPUs, {self.gpus:g} GPUs, {self.memory_bytes / GIB:.1f} GiB"


def nodes_of(address: RayAddress) -> list[Node]:
    """The living nodes of a cluster. Raises PreflightError if its dashboard does not answer within seconds."""
    import requests

    try:
        reply = requests.get(
            f"{address.dashboard}/api/v0/nodes",
            params={"detail": "true", "timeout": _SECONDS, "limit": 10_000},
            headers=address.headers(),
            auth=as_given,
            timeout=_SECONDS,
        )
        reply.raise_for_status()
        listed: list[dict[str, Any]] = reply.json()["data"]["result"]["result"]
    except (requests.RequestException, OSError, KeyError, TypeError, ValueError) as error:
        raise PreflightError(
            f"the Ray cluster at {address.dashboard} does not answer ({error}). Check the address and its token, or unset "
            "MLPIPES_RAY_ADDRESS to use this machine."
        ) from error
    found = []
    for node in listed:
        if node["state"] == "ALIVE":
            total = node.get("resources_total") or {}
            found.append(Node(node["node_ip"], total.get("CPU", 0), total.get("GPU", 0), total.get("memory", 0)))
    return found


def workers_that_fit(scale: RayScaleConfig, nodes: Sequence[Node], data_bytes: int) -> int:
    """How many of a scale's workers the nodes can hold together; a worker cannot be spread over nodes."""
    total = 0
    for node in nodes:
        by_cpu = node.cpus / scale.cpus_per_worker
        by_gpu = node.gpus / scale.gpus_per_worker if scale.gpus_per_worker else float("inf")
        # The data are memory-mapped: one copy a node, however many workers read them.
        by_memory = (node.memory_bytes - data_bytes) / WORKER_BYTES
        total += max(0, int(min(by_cpu, by_gpu, by_memory) + 1e-9))
    return total


def check_cluster(
    scale: RayScaleConfig, nodes: Sequence[Node], data_bytes: int, min_workers: int | None = None
) -> None:
    """Raises PreflightError saying what is asked for and what is there, if the scale's workers cannot be placed.

    All of them must fit, or `min_workers` of them where the training is elastic.
    """
    fit, needed = workers_that_fit(scale, nodes, data_bytes), min_workers or scale.workers
    if fit >= needed:
        return
    wanted = f"{scale.cpus_per_worker:g} CPUs, {scale.gpus_per_worker:g} GPUs, {WORKER_BYTES / GIB:.1f} GiB"
    raise PreflightError(
        f"scale {scale.key} needs {needed} workers with {wanted} each; the cluster can place {fit}. "
        f"It has {'; '.join(map(str, nodes)) or 'no living node'}. Choose a scale that fits, or connect a larger cluster "
        "with MLPIPES_RAY_ADDRESS. Nothing was started."
    )


def check_elastic(scale: RayScaleConfig, min_workers: int | None, reduction: str) -> None:
    """Raises PreflightError if a training cannot be elastic as asked for."""
    if min_workers is None:
        return
    if min_workers > scale.workers:
        raise PreflightError(f"min_workers is {min_workers}, but scale {scale.key} has at most {scale.workers} workers")
    if reduction != "ordered":
        raise PreflightError(
            f"min_workers with `reduction: {reduction}` would let the number of workers change the model; use `ordered`"
        )


def check_shards(scale: RayScaleConfig, logical_shards: int, rows: int) -> None:
    """Raises PreflightError if the scale's workers or batch do not fit the training itself."""
    if scale.workers > logical_shards:
        raise PreflightError(
            f"scale {scale.key} has {scale.workers} workers, but a global batch is divided into {logical_shards} logical "
            f"shards. Set the hyperparameter `logical_shards` to at least {scale.workers} (this is a different training)."
        )
    if scale.batch_size > rows:
        raise PreflightError(
            f"scale {scale.key} has a global batch of {scale.batch_size}, but the training split has only {rows} samples"
        )


def check_disk(folder: Path, needed_bytes: int = FREE_DISK_BYTES) -> None:
    """Raises PreflightError if the disk under a folder has less room than a training may need."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise PreflightError(
            f"the disk of {folder} has {free / GIB:.2f} GiB free; checkpoints need {needed_bytes / GIB:.2f} GiB. "
            "Make room, or set MLPIPES_HOME to a larger disk. Nothing was started."
        )
