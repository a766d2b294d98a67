"""Drawings: small pictures of rectangles, for super-resolution that learns something in a few steps."""

from typing import Any

import numpy as np

from mlpipes.data.dataset import Dataset, Provenance
from mlpipes.data.splits import SplitPlan
from mlpipes.workloads.super_resolution import SuperResolution

SIDE = 48


def drawing(generator: np.random.Generator, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """A picture uint8 (3, height, width): rectangles with sharp edges on a background."""
    picture = np.empty((3, height, width), dtype=np.uint8)
    picture[:] = generator.integers(0, 256, (3, 1, 1))
    for _ in range(12):
        top, left = generator.integers(0, height - 4), generator.integers(0, width - 4)
        down, across = generator.integers(3, 20, 2)
        picture[:, top : top + down, left : left + across] = generator.integers(0, 256, (3, 1, 1))
    return picture


def columns_of(pictures: Any) -> dict[str, np.ndarray]:
    """The columns of pictures of one size, each a photograph of its own."""
    images = np.stack(pictures)
    numbers = np.arange(len(images))
    sizes = np.tile(np.array(images.shape[2:]), (len(images), 1))
    return {"image": images, "size": sizes, "photograph": numbers, "region": numbers}


class Drawings:
    """60 drawings."""

    def load(self) -> Dataset:
        generator = np.random.default_rng(5)
        train = columns_of([drawing(generator) for _ in range(60)])
        provenance = Provenance("Drawings", "CC0", "made by a test", "synthetic")
        return Dataset({"train": train}, provenance, {"photographs": [f"drawing {n}" for n in range(60)]})


drawings = SuperResolution(Drawings(), SplitPlan(0.1, test_fraction=0.2, group_by="region", content=("image",)))
