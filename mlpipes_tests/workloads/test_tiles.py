"""Tiles: each pixel once, with what the network looks at; what cannot be seen around a tile is not asked for."""

import pytest
import torch
from torch import Tensor

from mlpipes.workloads.tiles import in_tiles, spans

REACH = 3


def test_tiles_cover_a_side_once() -> None:
    for length in (1, 31, 32, 33, 100, 257):
        own = [inner for inner, _ in spans(length, 32, REACH)]
        assert [n for inner in own for n in range(inner.start, inner.stop)] == list(range(length))
        assert all(inner.stop - inner.start <= 32 for inner in own)
        for inner, outer in spans(length, 32, REACH):
            assert outer.start == max(0, inner.start - REACH)
            assert outer.stop == min(length, inner.stop + REACH)


@pytest.mark.parametrize("clip", [(), (2,)])
def test_each_tile_is_put_where_it_belongs(clip: tuple[int, ...]) -> None:
    frames = torch.randint(0, 256, (2, *clip, 33, 70, 3), dtype=torch.uint8)
    seen: list[tuple[int, int]] = []

    def doubled(part: Tensor) -> Tensor:
        assert part.is_contiguous()
        seen.append((part.shape[-3], part.shape[-2]))
        last = part if part.ndim == 4 else part[:, -1]
        return last.repeat_interleave(2, 1).repeat_interleave(2, 2)

    made = in_tiles(doubled, frames, 2, REACH, (20, 40))
    assert made.dtype == torch.uint8
    assert torch.equal(made, doubled(frames))
    assert seen[:-1] == [(16 + 3, 35 + 3)] * 2 + [(17 + 3, 35 + 3)] * 2
