"""Blobs: classifiers of overlapping clouds of points, smoothed until they are far too unsure; small and quick."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlpipes.data.dataset import Columns, Dataset, Provenance
from mlpipes.data.splits import SplitPlan
from mlpipes.workloads.base import Batch, DataInfo
from mlpipes.workloads.classification import Classification
from mlpipes.workloads.deployables import TorchProgram


class Clouds:
    """1,500 points of three clouds that overlap."""

    def load(self) -> Dataset:
        generator = np.random.default_rng(0)
        labels = np.arange(1500) % 3
        points = generator.normal(size=(1500, 4)).astype(np.float32)
        points[np.arange(1500), labels] += 2
        return Dataset(
            {"train": {"point": points, "label": labels}},
            Provenance("Clouds", "CC0", "made by a test", "synthetic"),
            {"class_names": ["a", "b", "c"]},
        )


class Blobs(Classification):
    """Deploys the model itself."""

    source, split = Clouds(), SplitPlan(0.3, test_fraction=0.3)

    def build_model(self, hp: Any, info: DataInfo) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

    def optimizers(self, model: nn.Module, hp: Any) -> Sequence[torch.optim.Optimizer]:
        return [torch.optim.AdamW(model.parameters(), lr=1e-2)]

    def learning_rate_factor(self, progress: float, hp: Any) -> float:
        return 1 - progress

    def batch(self, columns: Mapping[str, Any], rows: Tensor, hp: Any, *, augment: bool) -> Batch:
        return {name: columns[name][rows] for name in ("point", "label")}

    def loss(self, model: nn.Module, batch: Batch, hp: Any) -> Tensor:
        return F.cross_entropy(model(batch["point"]).float(), batch["label"], reduction="sum", label_smoothing=0.6)

    def predict(self, model: nn.Module, batch: Batch, hp: Any) -> dict[str, Tensor]:
        return {"logits": model(batch["point"])}

    def deployable(self, model: nn.Module, hp: Any, info: DataInfo, columns: Columns) -> TorchProgram:
        return TorchProgram(model, np.array(columns["point"][:4]))


class Probable(Blobs):
    """Deploys probabilities."""

    def deployable(self, model: nn.Module, hp: Any, info: DataInfo, columns: Columns) -> TorchProgram:
        return TorchProgram(nn.Sequential(model, nn.Softmax(dim=1)), np.array(columns["point"][:4]))


class Aside(Blobs):
    """Passes the model's `forward` by, so that nothing divides its logits."""

    def predict(self, model: Any, batch: Batch, hp: Any) -> dict[str, Tensor]:
        return {"logits": model[2](model[1](model[0](batch["point"])))}


class Twice(Blobs):
    """Asks `forward` for more than what its logits are linear in."""

    def predict(self, model: nn.Module, batch: Batch, hp: Any) -> dict[str, Tensor]:
        return {"logits": model(batch["point"]) ** 3}


blobs, probable, aside, twice = Blobs(), Probable(), Aside(), Twice()
