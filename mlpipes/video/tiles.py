"""A torch program applied to frames: large ones in tiles that overlap by what it looks at, so that no seam is seen."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from mlpipes.video.job import ModelPin

TILE = (320, 512)
"""Height and width of a tile at most, in pixels of the source, without its overlap. What a layer makes of a larger one
leaves the processor's caches, and of several frames at once too: both took up to 1.7 times as long a pixel."""


class Program:
    """An exported program (pt2) as an upscaler, on one thread."""

    def __init__(self, path: Path, pinned: ModelPin, tile: tuple[int, int] = TILE) -> None:
        torch.set_num_threads(1)  # other numbers of threads give other bits
        self.scale, self.frames, self.reach, self.tile = pinned.scale, pinned.frames, pinned.reach, tile
        self.program = torch.export.load(path).module()
        self.bf16 = pinned.precision == "bf16"

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """The frames, upscaled."""
        height, width = frames.shape[-3:-1]
        made = np.empty((len(frames), height * self.scale, width * self.scale, 3), np.uint8)
        for frame, target in zip(frames, made, strict=True):
            for rows, outer_rows in spans(height, self.tile[0], self.reach):
                for columns, outer_columns in spans(width, self.tile[1], self.reach):
                    upscaled = self._run(frame[None, ..., outer_rows, outer_columns, :])[0]
                    target[_times(rows, self.scale), _times(columns, self.scale)] = upscaled[
                        _inside(rows, outer_rows, self.scale), _inside(columns, outer_columns, self.scale)
                    ]
        return made

    def _run(self, frames: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(np.ascontiguousarray(frames))
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return self.program(given).numpy()


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
