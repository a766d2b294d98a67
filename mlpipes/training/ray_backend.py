"""The process group of Ray Train's workers, whose store listens where Ray does and nowhere else.

Ray's own backend has PyTorch open its store (`TCPStore`), which asks nobody for a password, on every interface of the
machine, although a private Ray keeps to loopback. Here the store gets a socket that is bound to the node's Ray address.

Only the workers import torch: the driver and Train's controller are quicker, and 300 MiB smaller each, without it.
"""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psutil
import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_LOOPBACK = "127.0.0.1"
_SHUTDOWN_SECONDS = 30.0
_opened: list[TCPStore] = []
"""What rank 0 serves; it lives as long as its process."""


class LeanTrainer(DataParallelTrainer):
    """What TorchTrainer is, less its import of torch and three actors that we have no use for, 4 CPU-seconds a start.

    One hands out Ray datasets, and our workers read snapshots. One outlives a controller that was killed, to free its
    resources; our driver ends with its controller then, and Ray frees what a job had. One, once a cluster, divides what an
    autoscaler may bring among trainings and Ray datasets. Without it, a fixed number of workers asks for its place by its
    placement group alone, whose demand Ray documents as one that its autoscaler serves.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        if type(options.get("scaling_policy")) is FixedScalingPolicy:
            options["scaling_policy"] = _AsManyAsAsked(self.scaling_config)
        return super()._initialize_and_run_controller(**options)


class _AsManyAsAsked(FixedScalingPolicy):
    """A fixed number of workers, without the actor that would be told of it."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Tell nobody."""

    def _maybe_send_resource_request(self) -> None:
        """Tell nobody."""

    def _cancel_resource_request(self) -> None:
        """There is nothing to take back."""


@dataclass
class GroupConfig(BackendConfig):
    """Which backend of torch.distributed (`gloo` or `nccl`), and how long its operations may take."""

    backend: str
    timeout_s: float = 1800

    @property
    def backend_cls(self) -> Any:
        """Who sets the group up."""
        return GroupBackend

    def to_dict(self) -> dict[str, Any]:
        """What Ray shows of it."""
        return asdict(self)


class GroupBackend(Backend):
    """Starts and ends the group, on all workers at once."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Open the store on rank 0 and have every worker join."""
        size, limit = len(worker_group), timedelta(seconds=backend_config.timeout_s)
        host, port = worker_group.execute_single(0, _open_store, limit)
        ray.get(
            [
                worker_group.execute_single_async(rank, _join, host, port, backend_config.backend, rank, size, limit)
                for rank in range(size)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Leave the group; a worker that hangs is not waited for long, for Ray ends it next."""
        leaving = worker_group.execute_async(_leave)
        ray.wait(leaving, num_returns=len(leaving), timeout=_SHUTDOWN_SECONDS)


def _open_store(timeout: timedelta) -> tuple[str, int]:
    from torch.distributed import TCPStore

    host = ray.util.get_node_ip_address()
    listening = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listening.getsockname()[1]
    _opened[:] = [
        TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timeout,
            master_listen_fd=listening.detach(),
        )
    ]
    return host, port


def _join(host: str, port: int, backend: str, rank: int, size: int, timeout: timedelta) -> None:
    import torch.distributed as dist

    if host == _LOOPBACK:
        # gloo listens on the address of the host's name unless told otherwise.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback_interface())
    store = _opened[0] if rank == 0 else dist.TCPStore(host, port, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def loopback_interface() -> str:
    """The name of the interface that has 127.0.0.1: `lo` on Linux, `lo0` on macOS."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == _LOOPBACK for address in addresses):
            return name
    raise RuntimeError(f"no network interface has the address {_LOOPBACK}")
