"""Memory that workers share: it grows, nobody reads what another has written since, and nothing is left behind."""

import os
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlpipes.training import shared_memory
from mlpipes.training.gradient import ShardedGradient
from mlpipes.training.parallel import Workers
from mlpipes.training.reduction import TreeReduction
from mlpipes.training.shared_memory import SharedMemoryReduction
from mlpipes_tests.training.test_parallel import together
from mlpipes_tests.waiting import LIMIT_SECONDS


def roots_of(reduction: TreeReduction, rank: int, size: int, step: int) -> list[Tensor]:
    """Random roots of a worker in a step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return [torch.randn(size, generator=generator) for _ in reduction.spans[rank]]


def expected(reduction: TreeReduction, size: int, step: int) -> Tensor:
    """Their sum in the order of the tree."""
    roots = [(rank, roots_of(reduction, rank, size, step)) for rank in range(reduction.workers.size)]
    return reduction.added_up(
        {span: root for rank, found in roots for span, root in zip(reduction.spans[rank], found, strict=True)}
    )


def written(reduction: TreeReduction, size: int, step: int) -> Tensor:
    """The memory with this worker's roots."""
    roots = roots_of(reduction, reduction.workers.rank, size, step)
    memory = reduction.rows(len(roots), size)
    for row, root in zip(memory, roots, strict=True):
        row[:size] = root
    return memory


def files_in_memory() -> list[str]:
    """Of this process."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the folder itself, while it was listed
            found.append(str(link.readlink()))
    return [name for name in found if name.startswith("/memfd:mlpipes-")]


def sums_of_several_sizes(workers: Workers) -> dict[str, Any]:
    """Whether each is right, and what is open before, meanwhile and afterwards."""
    before = len(files_in_memory())
    reduction = SharedMemoryReduction(workers, 7)
    right = {
        size: torch.equal(reduction.sum(written(reduction, size, step))[:size], expected(reduction, size, step))
        for step, size in enumerate([5, 1, 6, 1000, 900, 50_001, 12])
    }
    meanwhile = len(files_in_memory())
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8").count("mlpipes-")
    del reduction
    left = Path("/proc/self/maps").read_text(encoding="utf-8").count("mlpipes-")
    return {"right": right, "open": (before, meanwhile, len(files_in_memory())), "mapped": (mapped, left)}


@pytest.mark.parametrize("size", [2, 3])
def test_memory_grows_and_goes(size: int) -> None:
    for found in together(size, sums_of_several_sizes):
        assert all(found["right"].values()), found["right"]
        assert len(found["right"]) == 7
        assert found["open"] == (0, 1 + size, 0)
        assert found["mapped"] == (size, 0)


def sums_with_a_late_reader(workers: Workers, gate: str) -> bool:
    """Whether a sum is right whose reader sleeps until the other one has written the next step's roots."""
    reduction = SharedMemoryReduction(workers, 2)
    if workers.rank == 1:
        cat = torch.cat

        def late(*given: Any, **named: Any) -> Tensor:
            began = time.monotonic()
            while not Path(gate).exists():
                assert time.monotonic() - began < LIMIT_SECONDS
                time.sleep(0.01)
            return cat(*given, **named)

        torch.cat = late
    size = 1000
    found = reduction.sum(written(reduction, size, 0))[:size].clone()
    if workers.rank == 0:
        written(reduction, size, 1)
        Path(gate).touch()
    return torch.equal(found, expected(reduction, size, 0))


def test_who_is_late_reads_no_later_step(tmp_path: Path) -> None:
    assert together(2, partial(sums_with_a_late_reader, gate=str(tmp_path / "gate"))) == [True, True]


def sums_with_a_late_writer(workers: Workers) -> bool:
    """Whether the sum of a second step is right for which one worker writes its roots a second later than the other."""
    reduction, size = SharedMemoryReduction(workers, 2), 1000
    reduction.sum(written(reduction, size, 0))
    if workers.rank == 1:
        time.sleep(1)
    return torch.equal(reduction.sum(written(reduction, size, 1))[:size], expected(reduction, size, 1))


def test_who_is_early_waits_for_what_the_others_write() -> None:
    assert together(2, sums_with_a_late_writer) == [True, True]


def way_without(workers: Workers, what: str) -> tuple[str, list[list[float]]]:
    """How gradients are added up where one worker cannot do something, and what comes of it."""
    if workers.rank == 1 and what == "an older Python":
        del os.memfd_create
    elif workers.rank == 1 and what:
        where, call = {
            "making": (os, "memfd_create"),
            "opening": (shared_memory, "_opened"),
            "growing": (os, "ftruncate"),
            "mapping": (torch, "from_file"),
        }[what]

        def forbidden(*_: Any, **__: Any) -> None:
            raise OSError(what)

        setattr(where, call, forbidden)
    torch.manual_seed(0)
    model, data = nn.Linear(6, 5), torch.randn(16, 6)
    gradient = ShardedGradient(model, workers, 4, "ordered")
    gradient.compute(torch.arange(16), lambda _, rows: [(model(data[rows]).square().sum(), len(rows))])
    assert model.weight.grad is not None
    return type(gradient._tree).__name__, model.weight.grad.tolist()


@pytest.mark.parametrize("what", ["making", "an older Python", "opening", "growing", "mapping"])
def test_where_one_worker_cannot_share_memory_all_go_through_gloo(what: str) -> None:
    shared, *_ = together(2, partial(way_without, what=""))
    assert shared[0] == "SharedMemoryReduction"
    for way, found in together(2, partial(way_without, what=what)):
        assert way == "TreeReduction"
        assert found == shared[1]


def maps_what_its_maker_has_closed(workers: Workers) -> bool:
    """Whether a worker maps the memory of one that has none open any more, as if it had been killed."""
    reduction = SharedMemoryReduction(workers, 2)
    others = reduction._files[1 - workers.rank]
    workers.meet()
    if workers.rank == 1:
        del reduction
    workers.meet()
    return workers.rank == 1 or len(torch.from_file(f"/proc/self/fd/{others}", shared=True, size=10)) == 10


def test_who_is_killed_takes_no_memory_from_the_others() -> None:
    """They would report a file that is missing, which ends a training; that a worker is gone starts it again."""
    assert together(2, maps_what_its_maker_has_closed) == [True, True]


def test_another_file_under_the_same_number_is_not_taken_for_memory(tmp_path: Path) -> None:
    """Workers that count their processes separately name processes that have nothing to do with them."""
    token, here = 0x1234, os.getpid()
    with ExitStack() as files:
        file = shared_memory._created(shared_memory._name(token), files)
        other = os.open(tmp_path / "mlpipes-0000000000001234", os.O_CREAT | os.O_RDWR)
        files.callback(os.close, other)
        assert os.path.sameopenfile(shared_memory._opened(here, file, token, files), file)
        for wrong in ((here, file, token + 1), (here, other, token), (here, 999_999, token), (here, -1, token)):
            with pytest.raises(OSError, match=r"another file|No such file"):
                shared_memory._opened(*wrong, files)
