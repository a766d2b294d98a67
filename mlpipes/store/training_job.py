"""What one attempt's driver and workers are told: the recipe, the places, and how to behave."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from mlpipes.store.layout import Store, TrainingFolder
from mlpipes.store.recipe import Recipe
from mlpipes.store.record import Record


class Checkpointing(BaseModel):
    """When checkpoints are written besides the end of each epoch, and how many are kept. Does not change any number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every_steps: int | None = None
    every_seconds: float | None = 60.0
    keep_last: int = 2


class Tracking(BaseModel):
    """Where the training's curve goes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    run_id: str


class TrainingJob(Record):
    """One attempt at a training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Recipe
    store: str
    attempt: int
    checkpointing: Checkpointing = Checkpointing()
    tracking: Tracking | None = None
    max_worker_failures: int = 3
    min_workers: int | None = None
    """With fewer workers than the scale has, down to this number, the training starts or continues (Ray Train's elastic
    scaling). With ordered sums that changes its speed, not its numbers; so it is no part of the recipe."""
    resize_seconds: float = 60.0
    """How often an elastic training looks for workers to gain."""
    requested_by: str = ""
    """The Dagster run that submitted it."""

    @property
    def folder(self) -> TrainingFolder:
        """The training's folder."""
        return Store(Path(self.store)).training(self.recipe.fingerprint)

    @property
    def snapshot(self) -> Path:
        """The snapshot's folder."""
        return Store(Path(self.store)).snapshots / self.recipe.snapshot

    def write(self) -> Path:
        """Store it where the driver reads it; returns the file."""
        path = self.folder.specification(self.attempt)
        self.write_to(path)
        return path
