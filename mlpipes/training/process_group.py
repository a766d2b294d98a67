"""The process group of Ray Train's workers, whose store listens where Ray does and nowhere else.

Ray's own backend has PyTorch open its store (`TCPStore`), which asks nobody for a password, on every interface of the
machine, although a private Ray keeps to loopback. Here the store gets a socket that is bound to the node's Ray address.
"""

import os
import socket
from datetime import timedelta
from typing import Any

import psutil
import ray
import torch.distributed as dist
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

_LOOPBACK = "127.0.0.1"
_SHUTDOWN_SECONDS = 30.0
_opened: list[dist.TCPStore] = []
"""What rank 0 serves; it lives as long as its process."""


class GroupConfig(TorchConfig):
    """Ray's settings (`backend`, `timeout_s`), with the group set up as said above."""

    @property
    def backend_cls(self) -> Any:
        """Who sets it up."""
        return GroupBackend


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
    host = ray.util.get_node_ip_address()
    listening = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listening.getsockname()[1]
    _opened[:] = [
        dist.TCPStore(
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
    if host == _LOOPBACK:
        # gloo listens on the address of the host's name unless told otherwise.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback_interface())
    store = _opened[0] if rank == 0 else dist.TCPStore(host, port, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def loopback_interface() -> str:
    """The name of the interface that has 127.0.0.1: `lo` on Linux, `lo0` on macOS."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == _LOOPBACK for address in addresses):
            return name
    raise RuntimeError(f"no network interface has the address {_LOOPBACK}")
