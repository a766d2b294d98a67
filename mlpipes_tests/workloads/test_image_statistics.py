"""The statistics of images: exact, so that they depend on nothing but the pixels, and made of a few rows at a time."""

from fractions import Fraction
from math import isqrt
from typing import Any

import numpy as np
import pytest

from mlpipes.workloads import image_classification
from mlpipes.workloads.image_classification import digits


def test_mean_and_deviation_are_exact_however_the_rows_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (301, 3, 5, 7), dtype=np.uint8)
    images[:, 1] //= 40
    whole = digits.statistics({"image": images})
    for channel in range(3):
        values = images[:, channel].ravel().tolist()
        mean = Fraction(sum(values), len(values))
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        assert whole["mean"][channel] == float(mean)
        root = Fraction(isqrt(int(variance * 10**60)), 10**30)
        assert whole["std"][channel] == pytest.approx(float(root), rel=3e-16)
    for pixels in (1, 105, 1000, 12_345):
        monkeypatch.setattr(image_classification, "_PIXELS_AT_ONCE", pixels)
        assert digits.statistics({"image": images}) == whole


def test_a_channel_of_one_value_is_divided_by_one() -> None:
    images = np.full((4, 2, 3, 3), 255, dtype=np.uint8)
    images[0, 1] = 0
    found = digits.statistics({"image": images})
    assert found["mean"] == [255.0, 191.25]
    assert found["std"][0] == 1.0
    assert found["std"][1] == pytest.approx(255 * 0.1875**0.5, rel=1e-15)


def test_memory_mapped_images_are_never_whole_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_classification, "_PIXELS_AT_ONCE", 4 * 3 * 8 * 8)

    class Column:
        """Is read in slices only."""

        def __init__(self, images: np.ndarray) -> None:
            self.images, self.shape, self.size = images, images.shape, images.size

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, rows: int | slice) -> np.ndarray:
            assert len(self.images[rows]) <= 4
            return self.images[rows]

        def __array__(self, *_: Any) -> np.ndarray:
            raise AssertionError("read as a whole")

    images = Column(np.zeros((100, 3, 8, 8), dtype=np.uint8))
    assert digits.statistics({"image": images})["mean"] == [0, 0, 0]
