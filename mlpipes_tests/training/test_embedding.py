"""Embeddings that keep their gradient's memory: the same bits as autograd's, step after step."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlpipes.training.embedding import SparseReadEmbedding, keep_embedding_gradients

ROWS, WIDTH = 5000, 256


class Reader(nn.Module):
    """A table of words, perhaps also used as the output layer, and a small one that stays as it is."""

    def __init__(self, padding: int | None, tied: bool = False) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(ROWS, WIDTH, padding_idx=padding), nn.Embedding(64, WIDTH)
        self.tied = tied

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) to (B, T, width or rows)."""
        found = torch.tanh(self.words(ids) + self.places(torch.arange(ids.shape[1])))
        return F.linear(found, self.words.weight) if self.tied else found


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("padding", "tied"), [(None, False), (0, False), (0, True)])
def test_trains_to_the_same_bits_as_autograd(shards: int, padding: int | None, tied: bool) -> None:
    """Weights and gradients after each of five steps, also with gradients added up over shards and with a tied table."""
    torch.manual_seed(0)
    usual = Reader(padding, tied)
    ours = copy.deepcopy(usual)
    keep_embedding_gradients(ours)
    assert type(ours.words) is SparseReadEmbedding
    assert type(ours.places) is nn.Embedding
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True) for model in (usual, ours)]
    for _ in range(5):
        batches = [torch.randint(60 if shard else ROWS, (8, 12)) for shard in range(shards)]
        for model, optimizer in zip((usual, ours), optimizers, strict=True):
            for parameter in model.parameters():
                parameter.grad = None
            for ids in batches:
                (model(ids) ** 2).mean().backward()
            if type(model.words) is SparseReadEmbedding:
                model.words.put(model.words.take())
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        for a, b in zip(usual.parameters(), ours.parameters(), strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert torch.equal(a.grad, b.grad)
        assert all(torch.equal(a, b) for a, b in zip(usual.parameters(), ours.parameters(), strict=True))
    assert type(ours.words) is (nn.Embedding if tied else SparseReadEmbedding)


def test_reuses_its_memory_and_leaves_frozen_tables_alone() -> None:
    """The gradient of each step lies where that of the last one lay; without a gradient nothing is kept."""
    model = Reader(None)
    keep_embedding_gradients(model)
    places = set()
    for _ in range(3):
        model.words.weight.grad = None
        model(torch.randint(ROWS, (2, 8))).sum().backward()
        assert isinstance(model.words, SparseReadEmbedding)
        model.words.put(model.words.take())
        assert model.words.weight.grad is not None
        places.add(model.words.weight.grad.data_ptr())
    assert len(places) == 1
    frozen = Reader(None)
    frozen.words.weight.requires_grad_(False)
    keep_embedding_gradients(frozen)
    frozen(torch.randint(ROWS, (2, 8))).sum().backward()
    assert frozen.words.weight.grad is None


def test_a_row_left_out_is_a_row_of_zeros() -> None:
    """Sums of gradients of which each has other rows are those of whole tables, bit for bit, -0.0 included."""
    torch.manual_seed(0)
    model = Reader(0)
    keep_embedding_gradients(model)
    assert isinstance(model.words, SparseReadEmbedding)
    found, whole = [], []
    for _ in range(3):
        (model(torch.randint(60, (3, 5))) * torch.randn(WIDTH).relu() * -1).sum().backward()
        found.append(model.words.take())
        whole.append(torch.zeros(ROWS, WIDTH))
        whole[-1][found[-1].rows] = found[-1].values
        assert not (found[-1].values.eq(0) & found[-1].values.signbit()).any()
    model.words.put(found[0].plus(found[1]).plus(found[2]))
    assert model.words.weight.grad is not None
    assert torch.equal(model.words.weight.grad.view(torch.int32), (whole[0] + whole[1] + whole[2]).view(torch.int32))
    assert len(model.words.take().rows) == 0
