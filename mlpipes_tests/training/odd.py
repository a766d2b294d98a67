"""Odd workloads: what people write into a regression of a small table that the workloads of mlpipes never do."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlpipes.data.dataset import Columns, Dataset, Provenance
from mlpipes.data.splits import SplitPlan
from mlpipes.reporting.metric import Metric
from mlpipes.workloads.base import Batch, DataInfo
from mlpipes.workloads.deployables import TorchProgram
from mlpipes.workloads.regression import Regression


class Table:
    """120 rows of 5 numbers, and about their sum."""

    def load(self) -> Dataset:
        generator = np.random.default_rng(0)
        rows = generator.normal(size=(120, 5)).astype(np.float32)
        label = rows.sum(1, dtype=np.float64) + 0.1 * generator.normal(size=120)
        return Dataset(
            {"train": {"row": rows, "label": label}}, Provenance("Sums", "CC0", "made by a test", "synthetic")
        )


class Plain(Regression):
    """Nothing odd."""

    source, split = Table(), SplitPlan(0.2, test_fraction=0.2)

    def build_model(self, hp: Any, info: DataInfo) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))

    def optimizers(self, model: nn.Module, hp: Any) -> Sequence[torch.optim.Optimizer]:
        return [torch.optim.AdamW(model.parameters(), lr=1e-2)]

    def learning_rate_factor(self, progress: float, hp: Any) -> float:
        return 1 - progress

    def batch(self, columns: Mapping[str, Any], rows: Tensor, hp: Any, *, augment: bool) -> Batch:
        return {name: columns[name][rows].float() for name in ("row", "label")}

    def loss(self, model: nn.Module, batch: Batch, hp: Any) -> Tensor:
        return ((model(batch["row"]) - batch["label"]) ** 2).sum()

    def predict(self, model: nn.Module, batch: Batch, hp: Any) -> dict[str, Tensor]:
        return {"value": model(batch["row"])}

    def deployable(self, model: nn.Module, hp: Any, info: DataInfo, columns: Columns) -> TorchProgram:
        return TorchProgram(model, np.array(columns["row"][:4]))


class OtherRandomNumbers(Plain):
    """Draws from NumPy and Python, for the first weights and for augmentation."""

    def build_model(self, hp: Any, info: DataInfo) -> nn.Module:
        layer = nn.Linear(5, 1)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(np.random.randn(1, 5)))
        return nn.Sequential(layer, nn.Flatten(0))

    def batch(self, columns: Mapping[str, Any], rows: Tensor, hp: Any, *, augment: bool) -> Batch:
        found = super().batch(columns, rows, hp, augment=augment)
        if augment:
            found["row"] = found["row"] + random.random() * torch.from_numpy(np.random.randn(len(rows), 5)).float()  # noqa: S311
        return found


class _TwiceTheSame(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 1)
        self.second.weight = self.first.weight

    def forward(self, rows: Tensor) -> Tensor:
        return self.last(self.second(self.first(rows)))[:, 0]


class Tied(Plain):
    """One weight of two layers."""

    def build_model(self, hp: Any, info: DataInfo) -> nn.Module:
        return _TwiceTheSame()


class Double(Plain):
    """In float64."""

    def build_model(self, hp: Any, info: DataInfo) -> nn.Module:
        return super().build_model(hp, info).double()


class Frozen(Plain):
    """With nothing to train."""

    def build_model(self, hp: Any, info: DataInfo) -> nn.Module:
        return super().build_model(hp, info).requires_grad_(False)


class TwoOfEach(Plain):
    """Says two things of each sample, one after the other."""

    def predict(self, model: nn.Module, batch: Batch, hp: Any) -> dict[str, Tensor]:
        value = model(batch["row"])
        return {"value": value, "both": torch.cat([value, value])}


class Undefined(Plain):
    """A metric that the validation split does not define."""

    metric = Metric("area")

    def validate(self, predictions: Mapping[str, np.ndarray], columns: Columns) -> dict[str, float]:
        return super().validate(predictions, columns) | {"area": float("nan")}


class Absent(Plain):
    """A metric that it does not compute."""

    metric = Metric("area")


class NumpysNumbers(Plain):
    """A metric as NumPy has it, of which JSON knows nothing."""

    def validate(self, predictions: Mapping[str, np.ndarray], columns: Columns) -> dict[str, float]:
        return {name: np.float32(value) for name, value in super().validate(predictions, columns).items()}  # pyright: ignore[reportReturnType]


class OneSampleNormalised(Plain):
    """Batch normalisation, of a part with one sample."""

    def build_model(self, hp: Any, info: DataInfo) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 1), nn.Flatten(0))


class ColumnOfLabels(Plain):
    """Answers of another shape than the labels."""

    def predict(self, model: nn.Module, batch: Batch, hp: Any) -> dict[str, Tensor]:
        return {"value": model(batch["row"])[:, None]}


plain, other_random_numbers, tied = Plain(), OtherRandomNumbers(), Tied()
double, frozen, two_of_each, undefined, absent = Double(), Frozen(), TwoOfEach(), Undefined(), Absent()
numpys_numbers, one_sample_normalised, column_of_labels = NumpysNumbers(), OneSampleNormalised(), ColumnOfLabels()
