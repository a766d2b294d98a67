"""Images: statistics that are exact and made of a few rows at a time, and networks that cannot read them say so."""

from fractions import Fraction
from math import isqrt
from typing import Any

import numpy as np
import pytest
import torch

from mlpipes.data.sources import DigitsSource
from mlpipes.data.splits import SplitPlan
from mlpipes.errors import ConfigError
from mlpipes.workloads import image_classification
from mlpipes.workloads.augmentation import shrunk
from mlpipes.workloads.base import DataInfo
from mlpipes.workloads.image_classification import Cifar10Hyperparameters, ImageClassification, cifar10, digits


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


def test_a_network_that_cannot_read_the_images_says_so() -> None:
    def info(pixels: int) -> DataInfo:
        shape = [3, pixels, pixels]
        return DataInfo({"class_names": ["a", "b"]}, {"mean": [0.0] * 3, "std": [1.0] * 3, "shape": shape})

    workload = ImageClassification(DigitsSource(), SplitPlan())
    with pytest.raises(ConfigError, match=r"airbench cannot read images of 8×8 pixels .*resnet18"):
        workload.build_model(workload.hyperparameters(), info(8))
    workload.build_model(workload.hyperparameters(network="resnet18"), info(8))
    for pixels in (16, 64):
        workload.build_model(workload.hyperparameters(), info(pixels))


def test_images_are_shrunk_in_the_first_part_of_the_training_and_never_where_it_is_judged() -> None:
    hp = Cifar10Hyperparameters(shrink=0.625, shrink_until=0.5)
    columns, rows = {"image": torch.zeros(4, 3, 32, 48, dtype=torch.uint8), "label": torch.zeros(4)}, torch.arange(3)

    def shape(progress: float, augment: bool) -> list[int]:
        return list(cifar10.batch(columns, rows, cifar10.stage(progress, hp), augment=augment)["image"].shape)

    assert shape(0.0, True) == shape(0.4999, True) == [3, 3, 20, 30]
    assert shape(0.5, True) == shape(1.0, True) == [3, 3, 32, 48]
    assert shape(0.0, False) == [3, 3, 32, 48]
    assert cifar10.stage(0.0, Cifar10Hyperparameters(shrink=None)).shrink is None


def test_shrunk_images_keep_their_brightness_and_have_no_alias() -> None:
    stripes = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    stripes[..., ::2] = 200
    found = shrunk(stripes, 0.5)
    assert found.shape == (1, 1, 4, 4)
    torch.testing.assert_close(found[..., 1:3], torch.full((1, 1, 4, 2), 100.0), atol=1e-4, rtol=0)


def test_images_that_are_shrunk_too_far_are_refused_before_anything_starts() -> None:
    info = DataInfo({"class_names": ["a", "b"]}, {"mean": [0.0] * 3, "std": [1.0] * 3, "shape": [3, 32, 32]})
    with pytest.raises(ConfigError, match=r"with `shrink` 0\.2, airbench cannot read images of 6×6 pixels"):
        cifar10.build_model(Cifar10Hyperparameters(shrink=0.2), info)
