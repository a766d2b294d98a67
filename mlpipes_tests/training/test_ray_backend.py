"""The process group of Ray Train's workers: who listens where, and that it works."""

import multiprocessing as mp
import os
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import ray
import torch
import torch.distributed as dist

from mlpipes.training.ray_backend import GroupBackend, GroupConfig, loopback_interface


def worker(pipe: Any, address: str) -> None:
    """A worker's process, as Ray has it: it does what it is told, and says what came of it."""
    ray.util.get_node_ip_address = lambda: address
    while True:
        try:
            function, args, options = pipe.recv()
        except EOFError:
            return
        pipe.send(function(*args, **options))


class Workers:
    """Stands for Ray Train's worker group: processes that run functions."""

    def __init__(self, size: int, address: str) -> None:
        context = mp.get_context("spawn")
        ends = [context.Pipe() for _ in range(size)]
        self.pipes = [here for here, _ in ends]
        self.processes = [context.Process(target=worker, args=(there, address), daemon=True) for _, there in ends]
        for process, (_, there) in zip(self.processes, ends, strict=True):
            process.start()
            there.close()

    def __len__(self) -> int:
        return len(self.pipes)

    def execute_single_async(self, rank: int, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self.pipes[rank].send((function, args, options))
        return self.pipes[rank]

    def execute_single(self, rank: int, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return self.execute_single_async(rank, function, *args, **options).recv()

    def execute_async(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        return [self.execute_single_async(rank, function, *args) for rank in range(len(self))]

    def listening(self) -> set[str]:
        connections = [c for p in self.processes for c in psutil.Process(p.pid).net_connections("inet")]
        return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


def summed(value: float) -> float:
    tensor = torch.tensor(value)
    dist.all_reduce(tensor)
    return float(tensor)


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda pipes: [pipe.recv() for pipe in pipes])
    monkeypatch.setattr(ray, "wait", lambda pipes, **_: [pipe.recv() for pipe in pipes])


@pytest.mark.parametrize("size", [1, 2])
def test_on_loopback_the_workers_listen_on_loopback_only(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    group, config = Workers(size, "127.0.0.1"), GroupConfig(backend="gloo", timeout_s=600)
    backend = config.backend_cls()
    assert isinstance(backend, GroupBackend)
    try:
        backend.on_start(group, config)
        pipes = group.execute_async(summed, 1.5)
        assert [pipe.recv() for pipe in pipes] == [1.5 * size] * size
        assert group.listening() == {"127.0.0.1"}
        # Where the name of the machine leads to loopback, gloo would be there anyway.
        pipes = group.execute_async(os.getenv, "GLOO_SOCKET_IFNAME")
        assert {pipe.recv() for pipe in pipes} == {loopback_interface()}
        backend.on_shutdown(group, config)
    finally:
        for pipe in group.pipes:
            pipe.close()
        for process in group.processes:
            process.join(300)
            process.kill()
