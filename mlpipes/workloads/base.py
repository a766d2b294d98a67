"""The workload contract: all that the engine needs to know to train, select, evaluate and export a model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from mlpipes.data.dataset import Columns, Dataset, Source
from mlpipes.data.splits import SplitPlan
from mlpipes.reporting.report import Report

Batch = dict[str, Tensor]


class Hyperparameters(BaseModel):
    """What every workload has; subclasses add their own. Every field is part of a training's fingerprint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    logical_shards: int = Field(
        default=4, ge=1, description="parts of a global batch; the most workers that can share it"
    )
    reduction: Literal["ordered", "allreduce"] = Field(
        default="ordered",
        description="ordered: the same bits at any number of workers; allreduce: less traffic, equal to rounding",
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto", description="auto: bf16 where the hardware has it"
    )


@dataclass(frozen=True)
class DataInfo:
    """What a model builder may know about the data: facts of the source and statistics of the training split."""

    facts: Mapping[str, Any]
    statistics: Mapping[str, Any]


class Workload(ABC):
    """One kind of training. An instance is stateless: everything that changes lives in the model and the optimizers."""

    primary_metric: ClassVar[str]
    """The validation metric that people look at first."""

    hyperparameters: type[Any] = Hyperparameters
    """The schema of what can be set, a subclass of `Hyperparameters`."""
    source: Source
    split: SplitPlan

    # -- data: runs once per snapshot ---------------------------------------------------------------------------------
    @property
    def preparation(self) -> dict[str, Any]:
        """Parameters of `prepare` and `statistics`, JSON; part of the snapshot's digest."""
        return {}

    def prepare(self, dataset: Dataset) -> Dataset:
        """The source's columns turned into what the model reads."""
        return dataset

    def statistics(self, train: Columns) -> dict[str, Any]:
        """What the model needs to know of the training split, such as means; JSON. Never sees the other splits."""
        return {}

    # -- model and optimization ---------------------------------------------------------------------------------------
    @abstractmethod
    def build_model(self, hp: Any, info: DataInfo) -> nn.Module:
        """The untrained model; the engine has seeded torch before."""

    def initialize(self, model: nn.Module, hp: Any, train: Columns) -> None:  # noqa: B027 - optional by design
        """Data-dependent initialization from the training split, in place."""

    @abstractmethod
    def optimizers(self, model: nn.Module, hp: Any) -> Sequence[torch.optim.Optimizer]:
        """The optimizers; the learning rate set here is the peak that `learning_rate_factor` scales."""

    @abstractmethod
    def learning_rate_factor(self, progress: float, hp: Any) -> float:
        """Factor on the peak learning rate at a fraction of all steps (0 ≤ progress < 1): a pure function, so no state."""

    # -- one batch ----------------------------------------------------------------------------------------------------
    @abstractmethod
    def batch(self, columns: Mapping[str, Tensor], rows: Tensor, hp: Any, *, augment: bool) -> Batch:
        """Inputs and targets of the given rows (B,), augmented by torch's global RNG, which the engine has seeded."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, hp: Any) -> Tensor:
        """The loss *summed* over the batch's samples, a scalar; the engine divides by the global batch size."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch, hp: Any) -> dict[str, Tensor]:
        """Outputs to judge, one row a sample, float32."""

    # -- judgement ----------------------------------------------------------------------------------------------------
    @abstractmethod
    def validate(self, predictions: Mapping[str, np.ndarray], columns: Columns) -> dict[str, float]:
        """Validation metrics; must hold `loss` and `primary_metric`."""

    @abstractmethod
    def rank(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """Sort key of a checkpoint by its validation metrics; the greatest is the best, and of equals the earliest."""

    @abstractmethod
    def report(self, predictions: Mapping[str, np.ndarray], columns: Columns, info: DataInfo) -> Report:
        """The judgement of the final model on the test split: estimates, tables, figures."""

    # -- serving ------------------------------------------------------------------------------------------------------
    @abstractmethod
    def serving_model(self, model: nn.Module, hp: Any) -> nn.Module:
        """The module to deploy: raw samples in (any batch size), outputs of `predict` out, no random numbers."""

    @abstractmethod
    def serving_example(self, columns: Columns) -> np.ndarray:
        """A small batch of raw samples to trace and document the deployed model with."""
