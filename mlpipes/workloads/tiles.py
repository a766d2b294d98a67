"""Tiles: frames go through an upscaler in parts that overlap by what it looks at; seams are not seen, and bits are equal."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

TILE = (320, 512)
"""Height and width of a tile at most, in pixels of the source, without its overlap. What a layer makes of a larger one
leaves the processor's caches, and of several frames at once too: both took up to 1.7 times as long a pixel. Evaluation,
endpoint and videos (on a CPU) cut alike, so that an answer has the bits of what was judged, however large the picture is."""


def in_tiles(
    upscale: Callable[[Tensor], Tensor], frames: Tensor, scale: int, reach: int, tile: tuple[int, int] = TILE
) -> Tensor:
    """Frames (..., H, W, 3), upscaled to (N, scale·H, scale·W, 3): of one tile after the other, all frames together.

    `reach` is how many pixels around it an output pixel depends on.
    """
    height, width = frames.shape[-3:-1]
    made: Tensor | None = None
    for rows, outer_rows in spans(height, tile[0], reach):
        for columns, outer_columns in spans(width, tile[1], reach):
            upscaled = upscale(frames[..., outer_rows, outer_columns, :].contiguous())
            if made is None:
                made = torch.empty(
                    (len(upscaled), height * scale, width * scale, upscaled.shape[-1]),
                    dtype=upscaled.dtype,
                    device=upscaled.device,
                )
            made[:, _times(rows, scale), _times(columns, scale)] = upscaled[
                :, _inside(rows, outer_rows, scale), _inside(columns, outer_columns, scale)
            ]
    assert made is not None  # noqa: S101 - a frame has at least one tile
    return made


def spans(length: int, tile: int, reach: int) -> Iterator[tuple[slice, slice]]:
    """A side of a frame in equal tiles: of each the part that is its own, and with what it looks at besides."""
    count = max(1, -(-length // tile))
    edges = [length * i // count for i in range(count + 1)]
    for start, stop in pairwise(edges):
        yield slice(start, stop), slice(max(0, start - reach), min(length, stop + reach))


def _times(span: slice, scale: int) -> slice:
    return slice(span.start * scale, span.stop * scale)


def _inside(own: slice, outer: slice, scale: int) -> slice:
    """Where a tile's own part lies in what was made of the tile."""
    return slice((own.start - outer.start) * scale, (own.stop - outer.start) * scale)
