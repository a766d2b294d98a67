"""The outcome: what a finished training came to, as `result.json` keeps it; its presence is what finished means."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from mlpipes.store.record import Record


class Best(BaseModel):
    """The best checkpoint by validation."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    step: int
    epoch: int
    metrics: dict[str, float]
    """On the validation split."""


class Usage(BaseModel):
    """What a training used, of all workers."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    cpu_seconds_per_second: float
    """Of all workers together."""
    peak_memory_bytes: int
    """Of the greatest worker."""
    peak_gpu_memory_bytes: int
    """Of the greatest worker."""
    gpu_utilisation: float | None
    """Mean over the workers, 0 to 1; None without a GPU, or where it is not known."""


class TrainingResult(Record):
    """What the loop comes to: the same on every worker, but for times."""

    steps: int
    steps_per_epoch: int
    best: Best
    weights_digest: str
    """Of the model after the last step, which need not be the best."""
    order_digest: str
    """Chained SHA-256 of the rows that every step read."""
    loss_digest: str
    """Chained SHA-256 of the loss of every step."""
    history: list[tuple[str, float, int, int]]
    """Every curve, as rows of (key, value, step, Unix time in ms)."""
    trail: list[tuple[int, str, str]] = Field(default_factory=list)
    """Rows of (step, order digest, loss digest), shortened, at each logged point; empty if it is older than trails."""
    precision: str
    train_seconds: float
    """In steps: no start-up, no evaluation, no checkpoints."""
    samples: int
    samples_per_second: float
    usage: Usage | None = None
    """None if it was not measured: the training is older than that."""
    parameters: int
    resumed_from_step: int


class Outcome(TrainingResult):
    """What the loop came to, and where it ran."""

    fingerprint: str
    attempt: int
    environment: dict[str, Any]
    """Device, libraries and so on, as `determinism.environment` finds them."""
