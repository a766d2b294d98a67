"""Clips: a made-up workload unlike all that come with mlpipes; 3-D convolutions, pictures as outputs, adapters only."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlpipes.data.dataset import Columns, Dataset, Provenance
from mlpipes.data.splits import SplitPlan
from mlpipes.reporting.metric import Metric
from mlpipes.reporting.report import Report
from mlpipes.reporting.statistics import mean_of
from mlpipes.workloads.base import Batch, DataInfo, Look, Workload
from mlpipes.workloads.deployables import TorchProgram
from mlpipes.workloads.optimization import adamw


class ClipSource:
    """Clips of 3 frames of 6×6 pixels and the frame in the middle, with less noise."""

    def load(self) -> Dataset:
        generator = np.random.default_rng(3)
        still = generator.normal(size=(90, 1, 6, 6)).astype(np.float32)
        clips = still[:, :, None] + 0.5 * generator.normal(size=(90, 1, 3, 6, 6)).astype(np.float32)
        provenance = Provenance("Clips", "CC0", "made by a test", "synthetic")
        return Dataset({"train": {"clip": clips, "label": still}}, provenance)


class Denoiser(nn.Module):
    """A frozen random stem, and an adapter behind it that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 8, 3, padding=1).requires_grad_(False)
        self.adapter = nn.Conv3d(8, 1, (3, 1, 1))

    def forward(self, clips: Tensor) -> Tensor:
        return self.adapter(self.stem(clips).relu())[:, :, 0]


class Clips(Workload):
    """Denoises the frame in the middle of a clip."""

    metric = Metric("mean_squared_error", higher_is_better=False)
    source, split = ClipSource(), SplitPlan(0.2, test_fraction=0.2)

    def build_model(self, hp: Any, info: DataInfo) -> nn.Module:
        return Denoiser()

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in model.state_dict().items() if name.startswith("adapter.")}

    def load_state(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        assert not model.load_state_dict(state, strict=False).unexpected_keys

    def optimizers(self, model: nn.Module, hp: Any) -> Sequence[torch.optim.Optimizer]:
        return [adamw(model, 1e-2, 0.0)]

    def learning_rate_factor(self, progress: float, hp: Any) -> float:
        return 1 - progress

    def batch(self, columns: Mapping[str, Any], rows: Tensor, hp: Any, *, augment: bool) -> Batch:
        return {name: columns[name][rows] for name in ("clip", "label")}

    def loss(self, model: nn.Module, batch: Batch, hp: Any) -> Tensor:
        return F.mse_loss(model(batch["clip"]), batch["label"], reduction="sum") / 36

    def predict(self, model: nn.Module, batch: Batch, hp: Any) -> dict[str, Tensor]:
        assert hp.micro_batch is None or len(batch["clip"]) <= hp.micro_batch
        return {"error": ((model(batch["clip"]) - batch["label"]) ** 2).mean((1, 2, 3))}

    def outputs(self, model: nn.Module, batch: Batch, hp: Any) -> dict[str, Tensor]:
        return {"frame": model(batch["clip"])}

    def validate(self, predictions: Mapping[str, np.ndarray], columns: Columns) -> dict[str, float]:
        error = float(predictions["error"].mean())
        return {"mean_squared_error": error, "loss": error}

    def report(self, predictions: Mapping[str, np.ndarray], columns: Columns, info: DataInfo, look: Look) -> Report:
        worst = np.argsort(-predictions["error"], kind="stable")[:5]
        seen = ((look(worst)["frame"] - np.asarray(columns["label"][worst])) ** 2).mean((1, 2, 3))
        return Report({"mean_squared_error": mean_of(predictions["error"])}, quantities={"worst": float(seen.max())})

    def scores(self, predictions: Mapping[str, np.ndarray], columns: Columns) -> np.ndarray:
        return -predictions["error"]

    def deployable(self, model: nn.Module, hp: Any, info: DataInfo, columns: Columns) -> TorchProgram:
        return TorchProgram(model, np.array(columns["clip"][:4]))


clips = Clips()
