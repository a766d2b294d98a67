"""The workload contract: all that the engine needs to know to train, select, evaluate and export a model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator
from torch import Tensor, nn

from mlpipes.data.dataset import Columns, Source
from mlpipes.data.snapshot import Prepared
from mlpipes.data.splits import SplitPlan
from mlpipes.errors import TrainingFailedError
from mlpipes.reporting.metric import Metric
from mlpipes.reporting.report import Report
from mlpipes.store.calibration import Calibration

Batch = dict[str, Tensor]
Look = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Runs the model on some rows (B,) of a split and returns its `outputs`, in the order of the rows."""


class Hyperparameters(BaseModel):
    """What every workload has; subclasses add their own. Every field is part of a training's fingerprint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    logical_shards: int | None = Field(
        default=4,
        ge=1,
        description="parts of a global batch, the most workers that can share it; null: one for each worker of the scale, "
        "the fastest, with which scales agree to rounding only",
    )
    reduction: Literal["ordered", "allreduce"] = Field(
        default="ordered",
        description="ordered: the same bits at any number of workers; allreduce: in the backend's order, equal to rounding",
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto", description="auto: bf16 where the hardware has it"
    )
    deterministic: bool = Field(
        default=True,
        description="only kernels that give the same bits every time; false: faster ones on a GPU, and an interrupted "
        "training may end in other bits",
    )
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="samples that go through the model at once where memory is short, in training (the rest of a shard "
        "accumulates) and in evaluation; null: a whole shard, and 500 in evaluation",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _take_no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts `true`, and YAML's `yes`, as 1."""
        if isinstance(value, bool):
            try:
                kind: Any = cls.model_fields[str(info.field_name)].annotation
                TypeAdapter(kind).validate_python(value, strict=True)
            except ValidationError:
                raise ValueError("write a number, a text or null, as the field has, and not true or false") from None
        return value


@dataclass(frozen=True)
class DataInfo:
    """What a model builder may know about the data: facts of the source and statistics of the training split."""

    facts: Mapping[str, Any]
    statistics: Mapping[str, Any]
    files: Path | None = None
    """The folder of the snapshot's files, such as a tokenizer and pretrained weights."""
    calibration: Calibration | None = None
    """How the outputs of a finished model are corrected; `predict` gives corrected ones then."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """What a finished model's forward passes run at."""


class Deployable(Protocol):
    """What is deployed of a trained model. `deployables` has two: a torch program, and Python code with files."""

    def log(self, extra_files: Sequence[Path]) -> Any:
        """Log it with signature and example to the MLflow run that is active; returns MLflow's `ModelInfo`.

        Loads what it stored, and raises ValueError if that answers otherwise than the trained model.
        """
        ...


class Workload(ABC):
    """One kind of training. An instance is stateless: everything that changes lives in the model and the optimizers."""

    metric: ClassVar[Metric]
    """The validation metric that people look at first, and that gates, champion and recommendation go by."""

    hyperparameters: type[Any] = Hyperparameters
    """The schema of what can be set, a subclass of `Hyperparameters`."""
    sparse_embedding_gradients: ClassVar[bool] = False
    """Whether a step's gradient of a large embedding holds only the rows that were read: the same bits, faster on a CPU."""
    served_rows: ClassVar[int] = 8
    """Samples of a forward pass of the finished model, where it is evaluated and where it is served: always as many, for
    the bits of an answer depend on their number. Fewer are filled up with copies, whose answers nobody sees.
    """
    source: Source
    split: SplitPlan

    # -- data: runs once per snapshot ---------------------------------------------------------------------------------
    @property
    def preparation(self) -> dict[str, Any]:
        """Parameters of `prepare` and `statistics`, JSON; part of the snapshot's digest."""
        return {}

    def prepare(self, splits: Mapping[str, Columns], facts: Mapping[str, Any], scratch: Path) -> Prepared:
        """The split columns turned into what the model reads; may fit to the training split, never to the others.

        `scratch` is an empty folder for files that go into the snapshot.
        """
        return Prepared(splits, facts)

    def statistics(self, train: Columns) -> dict[str, Any]:
        """What the model needs to know of the training split, such as means; JSON. Never sees the other splits."""
        return {}

    # -- model and optimization ---------------------------------------------------------------------------------------
    @abstractmethod
    def build_model(self, hp: Any, info: DataInfo) -> nn.Module:
        """The untrained model; the engine has seeded torch before."""

    def initialize(self, model: nn.Module, hp: Any, train: Columns) -> None:  # noqa: B027 - optional by design
        """Data-dependent initialization from the training split, in place."""

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """What is kept of a model in checkpoints and in the export; all of it by default.

        Fewer tensors, such as adapters only, where `build_model` makes the rest again from the seed and the snapshot's
        files, and no step changes it.
        """
        return model.state_dict()

    def load_state(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Put what `state` has returned into a model of `build_model`."""
        model.load_state_dict(state)

    @abstractmethod
    def optimizers(self, model: nn.Module, hp: Any) -> Sequence[torch.optim.Optimizer]:
        """The optimizers; the learning rate set here is the peak that `learning_rate_factor` scales."""

    @abstractmethod
    def learning_rate_factor(self, progress: float, hp: Any) -> float:
        """Factor on the peak learning rate at a fraction of all steps (0 ≤ progress < 1): a pure function, so no state."""

    def stage(self, progress: float, hp: Any) -> Any:
        """The hyperparameters of batch and loss at a fraction of all steps: a pure function; by default, they stay.

        For what changes on the way, such as the size of the images. Model, optimizers and evaluation know `hp` itself.
        """
        return hp

    def gradient_clip(self, hp: Any) -> float | None:
        """The greatest norm of the global batch's gradient; None: unlimited."""
        return None

    def lengths(self, columns: Mapping[str, Any]) -> np.ndarray | None:
        """What each sample costs (its tokens, say), int64 (N,): batches hold samples of like cost. None: all alike."""
        return None

    # -- one batch ----------------------------------------------------------------------------------------------------
    def micro_batches(self, columns: Mapping[str, Any], rows: Tensor, hp: Any) -> Sequence[Tensor]:
        """Rows that go through the model together, in order: all at once, or in parts where memory asks for it."""
        return [rows] if hp.micro_batch is None or len(rows) == 0 else rows.split(hp.micro_batch)

    @abstractmethod
    def batch(self, columns: Mapping[str, Any], rows: Tensor, hp: Any, *, augment: bool) -> Batch:
        """Inputs and targets of the given rows (B,), augmented by torch's global RNG, which the engine has seeded."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, hp: Any) -> Tensor:
        """The loss *summed* over the batch's samples, a scalar; the engine divides by `weight` of the global batch."""

    def weight(self, batch: Batch, hp: Any) -> Tensor | None:
        """What the batch counts in the mean loss, summed over its samples, a scalar; None: 1 a sample.

        For a mean over tokens, pixels or masked items, their number. The sum over a global batch must not be 0.
        """
        return None

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch, hp: Any) -> dict[str, Tensor]:
        """What evaluation needs of every sample, float32 (B, …); workers exchange it, so figures rather than pictures."""

    def outputs(self, model: nn.Module, batch: Batch, hp: Any) -> dict[str, Tensor]:
        """What a report may look at of a few samples, such as pictures that the model made; float32 (B, …)."""
        return self.predict(model, batch, hp)

    # -- evaluation ---------------------------------------------------------------------------------------------------
    @abstractmethod
    def validate(self, predictions: Mapping[str, np.ndarray], columns: Columns) -> dict[str, float]:
        """Validation metrics; must hold `loss` and `metric`."""

    def selection_key(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """Sort key of a checkpoint by its validation metrics; the greatest is the best, and of equals the earliest.

        By `metric`; the loss decides between equals, which a small validation split has often.
        """
        return self.metric.score(metrics[self.metric.name]), -metrics["loss"]

    def calibrate(self, predictions: Mapping[str, np.ndarray], columns: Columns) -> Calibration | None:
        """How the chosen model's outputs are to be corrected, by its predictions of the validation split; None: not."""
        return None

    def calibrated(self, model: nn.Module, calibration: Calibration) -> nn.Module:
        """The model as the calibration's parameters correct it, in `predict`, `outputs` and `deployable`; may be in place.

        `calibrate` of its predictions must then say as loss before what the calibration says as loss after.
        """
        return model

    @abstractmethod
    def report(self, predictions: Mapping[str, np.ndarray], columns: Columns, info: DataInfo, look: Look) -> Report:
        """The evaluation of the final model on the test split: estimates, tables, figures."""

    @abstractmethod
    def scores(self, predictions: Mapping[str, np.ndarray], columns: Columns) -> np.ndarray:
        """How well each sample was done, float (N,), greater is better: what two models are compared by, pairwise."""

    # -- serving ------------------------------------------------------------------------------------------------------
    def served_length(self, length: int) -> int:
        """To what a sample that costs so much is padded where the model is served; samples of equal ones go together."""
        return length

    def served_batch(self, columns: Mapping[str, Any], rows: Tensor, hp: Any) -> Batch:
        """The batch of `served_rows` rows (B,) of one `served_length`; its shape may depend on nothing else.

        `predict` must answer for the first B.
        """
        return self.batch(columns, rows, hp, augment=False)

    @abstractmethod
    def deployable(self, model: nn.Module, hp: Any, info: DataInfo, columns: Columns) -> Deployable:
        """What to deploy: raw samples in (any batch size), outputs out, no random numbers. Examples come from `columns`."""


def predicted(predictions: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """One of the outputs of `predict`. Raises TrainingFailedError if it is not there."""
    if name not in predictions:
        raise TrainingFailedError(f"`predict` gives {', '.join(map(repr, predictions)) or 'nothing'}, but no {name!r}")
    return predictions[name]
