"""Sums over shards: the same bits whoever computes them, however a batch is cut; and what they are is right."""

import multiprocessing as mp
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlpipes.errors import TrainingFailedError
from mlpipes.training import embedding
from mlpipes.training.determinism import weights_digest
from mlpipes.training.embedding import keep_embedding_gradients
from mlpipes.training.gradient import ShardedGradient
from mlpipes.training.parallel import DistributedWorkers, SingleWorker, Workers, shares
from mlpipes.training.reduction import TreeReduction, TreeSum, subtrees
from mlpipes.training.shared_memory import SharedMemoryReduction
from mlpipes_tests.waiting import LIMIT_SECONDS

BATCH, WORDS, STEPS = 41, 500, 2
SHARDS = (1, 2, 3, 4, 5, 6, 7, 8)
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "parts": {"parts": 3},
    "buckets": {"buckets": True},
    "buckets and parts": {"buckets": True, "parts": 2},
    "bf16": {"bf16": True, "parts": 2},
    "frozen": {"frozen": "first", "parts": 2},
    "frozen table": {"frozen": "words"},
    "tied": {"tied": True, "parts": 2},
    "some shards only": {"some": True},
    "weights": {"weighted": True, "parts": 3},
    "batch norm": {"norm": True, "parts": 2},
    "channels last": {"convolution": True},
}
"""What changes how a batch is cut and computed."""


class Network(nn.Module):
    """Reads words: a large table (with kept gradients), dense layers, a layer that not every shard reaches."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 16, padding_idx=0)
        self.first, self.norm = nn.Linear(16, 24), nn.BatchNorm1d(24) if options.get("norm") else nn.Identity()
        self.seldom, self.last, self.zero = nn.Linear(24, 24), nn.Linear(24, 7), nn.Parameter(torch.zeros(5))
        self.convolution = nn.Conv2d(3, 5, 3)
        self.tied = options.get("tied", False)

    def forward(self, ids: Tensor, seldom: bool) -> Tensor:
        """Ids (B, T) to (B, 7)."""
        hidden = torch.tanh(self.norm(self.first(self.words(ids).mean(1))))
        if seldom:
            hidden = hidden + self.seldom(hidden)
        out = self.last(hidden)
        if self.tied:
            out = out + (hidden @ self.first.weight @ self.words.weight[:7].T)
        return out


def digest_after_some_steps(workers: Workers, shards: int, shared: bool, **options: Any) -> str:
    """Of the weights, running statistics and last gradients, after some steps; `shared`: the workers' memory."""
    torch.manual_seed(0)
    model = Network(options)
    if options.get("convolution"):
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if frozen := options.get("frozen"):
        getattr(model, frozen).requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "_LARGE", 1000)
        keep_embedding_gradients(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9, fused=True)
    gradient = ShardedGradient(model, workers, shards, "ordered", options.get("weighted", False))
    if not shared:
        gradient._tree = TreeReduction(workers, shards, torch.device("cpu"))
    # Lengths of texts: with buckets, neighbours are alike and shards are not.
    lengths = torch.randint(2, 12, (400,))
    order = lengths.argsort(stable=True) if options.get("buckets") else torch.randperm(400)

    def losses(shard: int, rows: Tensor) -> Iterator[tuple[Tensor, Tensor | float]]:
        torch.manual_seed(shard)
        for part in rows.tensor_split(options.get("parts", 1)):
            if len(part) == 0:
                continue
            ids = (part[:, None] * 31 + torch.arange(int(lengths[part].max()))) % WORDS
            with torch.autocast("cpu", torch.bfloat16, enabled=options.get("bf16", False)):
                out = model(ids, seldom=not options.get("some") or shard % 3 == 1).float()
            each = (nn.functional.dropout(out, 0.2) ** 2).sum(1)
            if options.get("convolution"):
                images = torch.randn(len(part), 3, 8, 8).to(memory_format=torch.channels_last)
                each = each + model.convolution(images).square().mean((1, 2, 3))
            each = each + (model.zero * -0.0).sum()  # a gradient of -0.0: that a zero was added to it would show
            count = lengths[part] if options.get("weighted") else torch.ones(len(part))
            yield (each * count).sum(), count.sum()

    for step in range(STEPS):
        gradient.compute(order[step * BATCH : (step + 1) * BATCH], losses)
        optimizer.step()
    assert isinstance(gradient._tree, SharedMemoryReduction) is (shared and workers.size > 1)
    found = dict(model.state_dict())
    return weights_digest(
        found | {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    )


def all_digests(workers: Workers, shared: bool) -> dict[str, str]:
    """Every switch at 4 and 6 logical shards, and 1 to 8 of them, as far as so many workers can share them."""
    cases = [(switch, shards, options) for switch, options in SWITCHES.items() for shards in (4, 6)]
    cases += [("parts", shards, SWITCHES["parts"]) for shards in SHARDS]
    return {
        f"{switch}, {shards} shards": digest_after_some_steps(workers, shards, shared, **options)
        for switch, shards, options in cases
        if workers.size <= shards
    }


def _process(rank: int, size: int, meeting: str, task: Callable[[Workers], Any], results: Any) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=size)
    results.put((rank, task(DistributedWorkers())))
    dist.barrier()
    dist.destroy_process_group()


def together(size: int, task: Callable[[Workers], Any]) -> list[Any]:
    """What each of so many workers, in processes of their own, finds; by rank."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["mlpipes.training.gradient"])
    results = context.Queue()
    folder = tempfile.mkdtemp()
    arguments = [(rank, size, f"{folder}/meeting", task, results) for rank in range(size)]
    processes = [context.Process(target=_process, args=given) for given in arguments]
    try:
        for process in processes:
            process.start()
        found = dict(results.get(timeout=LIMIT_SECONDS) for _ in processes)
        for process in processes:
            process.join(300)
    finally:
        for process in processes:
            process.kill()
        shutil.rmtree(folder)
    return [found[rank] for rank in range(size)]


@pytest.fixture(scope="module")
def alone() -> Iterable[dict[str, str]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield all_digests(SingleWorker(), shared=False)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_however_a_batch_is_cut_any_number_of_workers_gives_the_same_bits(
    alone: dict[str, str], size: int, shared: bool
) -> None:
    for found in together(size, partial(all_digests, shared=shared)):
        assert len(found) >= 1
        assert found == {case: alone[case] for case in found}


def test_every_switch_and_every_number_of_shards_matters(alone: dict[str, str]) -> None:
    """Else the test above would compare the same thing many times."""
    digests = [digest for case, digest in alone.items() if case.endswith(" 6 shards")]
    assert len(set(digests)) == len(SWITCHES)
    assert len({alone[f"parts, {shards} shards"] for shards in SHARDS}) == len(SHARDS)


# -- the tree ---------------------------------------------------------------------------------------------------------
def written(leaves: int, share: range | None = None) -> list[str]:
    """The sums of consecutive leaves, written out."""
    tree = TreeSum[str](leaves, lambda left, right: f"({left}+{right})")
    for leaf in share or range(leaves):
        tree.push(range(leaf, leaf + 1), str(leaf))
    return [text for _, text in tree.roots]


def test_the_order_of_additions_is_written_in_stone() -> None:
    """Another order gives other bits: whoever changes it makes every model stale."""
    assert [written(n) for n in (1, 2, 3)] == [["0"], ["(0+1)"], ["((0+1)+2)"]]
    assert written(4) == ["((0+1)+(2+3))"]
    assert written(6) == ["(((0+1)+(2+3))+(4+5))"]
    assert written(7) == ["(((0+1)+(2+3))+((4+5)+6))"]
    assert written(8) == ["(((0+1)+(2+3))+((4+5)+(6+7)))"]


def test_consecutive_leaves_are_a_few_subtrees() -> None:
    assert [written(8, share) for share in shares(8, 3)] == [["(0+1)", "2"], ["3", "(4+5)"], ["(6+7)"]]
    assert subtrees(range(3, 6), 8) == [range(3, 4), range(4, 6)]
    assert [len(subtrees(share, 4)) for workers in (1, 2, 3, 4) for share in shares(4, workers)] == [1] * 10


@pytest.mark.parametrize("leaves", range(1, 20))
def test_whoever_adds_subtrees_the_sum_is_the_same(leaves: int) -> None:
    for workers in range(1, leaves + 1):
        whole = TreeSum[str](leaves, lambda left, right: f"({left}+{right})")
        for share in shares(leaves, workers):
            for span, text in zip(subtrees(share, leaves), written(leaves, share), strict=True):
                whole.push(span, text)
        assert [text for _, text in whole.roots] == written(leaves)


def test_a_single_worker_keeps_a_sum_a_level() -> None:
    tree, most = TreeSum[int](64, lambda a, b: a + b), 0
    for leaf in range(64):
        tree.push(range(leaf, leaf + 1), 1)
        most = max(most, len(tree.roots))
    assert most == 6
    assert tree.roots == [(range(64), 64)]


# -- what is computed -------------------------------------------------------------------------------------------------
def _adder(*weights: list[float], shards: int = 3, weighted: bool = True) -> tuple[nn.Module, Tensor]:
    """The gradient of a weighted mean of rows of data, whose weights are given shard by shard; and the figures."""
    model = nn.Linear(3, 1, bias=False)
    gradient = ShardedGradient(model, SingleWorker(), shards, "ordered", weighted)
    data = torch.arange(36.0).view(12, 3)
    of_shard = [torch.tensor(values) for values in weights]

    def losses(shard: int, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        yield (model(data[rows])[:, 0] * of_shard[shard]).sum(), of_shard[shard].sum()

    return model, gradient.compute(torch.arange(12), losses)


def test_weights_make_the_mean_over_what_counts_in_the_whole_batch() -> None:
    weights = [1.0, 0.0, 2.0, 0.0], [0.0] * 4, [5.0, 1.0, 1.0, 1.0]
    model, figures = _adder(*weights)
    expected = (torch.arange(36.0).view(12, 3) * torch.tensor([w for shard in weights for w in shard])[:, None]).sum(
        0
    ) / 11
    assert isinstance(model.weight, Tensor)
    assert model.weight.grad is not None
    assert torch.allclose(model.weight.grad[0], expected)
    assert torch.allclose(figures, torch.stack([(model.weight @ expected)[0].detach(), torch.tensor(11.0)]))


def test_weights_of_one_are_no_weights() -> None:
    torch.manual_seed(0)
    usual, _ = _adder([1.0] * 4, [1.0] * 4, [1.0] * 4, weighted=False)
    torch.manual_seed(0)
    weighted, _ = _adder([1.0] * 4, [1.0] * 4, [1.0] * 4)
    (a,), (b,) = usual.parameters(), weighted.parameters()
    assert a.grad is not None
    assert b.grad is not None
    assert torch.equal(a.grad, b.grad)


class _Phased(nn.Module):
    """A layer with frequencies that stay, and perhaps a counter that does not."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.inner, self.norm, self.counts = nn.Linear(3, 3), nn.BatchNorm1d(3, momentum=0.5), counts
        self.register_buffer("frequencies", torch.tensor([0.1, 0.2, 0.7]))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.frequencies, Tensor)
        if self.counts:
            self.frequencies += 1
        return self.norm(self.inner(x)) * self.frequencies


def test_only_running_statistics_are_averaged() -> None:
    """Thirds of a number do not add up to it: frequencies that are averaged over three shards drift."""
    torch.manual_seed(0)
    model, data = _Phased(counts=False), torch.randn(12, 3)
    before = torch.tensor([0.1, 0.2, 0.7])
    gradient = ShardedGradient(model, SingleWorker(), 3, "ordered")
    gradient.compute(torch.arange(12), lambda _, rows: [(model(data[rows]).sum(), len(rows))])
    assert torch.equal(model.get_buffer("frequencies"), before)
    means = torch.stack([model.inner(data[rows]).mean(0) for rows in torch.arange(12).tensor_split(3)])
    assert model.norm.running_mean is not None
    assert torch.allclose(model.norm.running_mean, means.mean(0) / 2, atol=1e-6)
    assert int(model.get_buffer("norm.num_batches_tracked")) == 1


@pytest.mark.parametrize("how", ["in place", "by another"])
@pytest.mark.parametrize("first", [0, 2])
def test_a_state_that_workers_would_not_share_is_refused(how: str, first: int) -> None:
    model, data = _Phased(counts=how == "in place"), torch.randn(12, 3)
    gradient = ShardedGradient(model, SingleWorker(), 3, "ordered")

    def losses(counts: bool) -> Any:
        def of(_: int, rows: Tensor) -> list[tuple[Tensor, int]]:
            model.counts = counts and how == "in place"
            if counts and how == "by another":
                model.frequencies = model.frequencies + 1
            return [(model(data[rows]).sum(), len(rows))]

        return of

    for _ in range(first):
        gradient.compute(torch.arange(12), losses(counts=False))
    with pytest.raises(TrainingFailedError, match="changes the buffer 'frequencies'"):
        gradient.compute(torch.arange(12), losses(counts=True))


def test_a_buffer_that_is_written_anew_with_what_it_holds_is_no_state() -> None:
    model, data = _Phased(counts=False), torch.randn(12, 3)
    model.register_buffer("nothing", torch.tensor(float("nan")))
    gradient = ShardedGradient(model, SingleWorker(), 3, "ordered")

    def losses(_: int, rows: Tensor) -> list[tuple[Tensor, int]]:
        model.frequencies = model.get_buffer("frequencies").clone()
        model.register_buffer("made_now", torch.ones(len(rows)))
        return [(model(data[rows]).sum(), len(rows))]

    for _ in range(3):
        gradient.compute(torch.arange(12), losses)


def test_more_workers_than_shards_are_refused() -> None:
    class Five(SingleWorker):
        size = 5

    with pytest.raises(ValueError, match="5 workers cannot share 4 logical shards"):
        ShardedGradient(nn.Linear(1, 1), Five(), 4, "ordered")
