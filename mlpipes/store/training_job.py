"""What one attempt's driver and workers are told: the recipe, the places, and how to behave."""

import os
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from mlpipes.store.environment import CREDENTIALS
from mlpipes.store.files import read_record, write_record
from mlpipes.store.layout import Store, TrainingFolder
from mlpipes.store.recipe import Recipe
from mlpipes.store.record import Record
from mlpipes.store.redaction import redact


class Checkpointing(BaseModel):
    """When checkpoints are written besides the end of each epoch, and how many are kept. Does not change any number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every_steps: int | None = None
    every_seconds: float | None = 60.0
    mean_seconds_between_failures: float | None = None
    """If it is given, the interval follows from it and from what a checkpoint is measured to cost."""
    keep_last: int = 2


class Tracking(BaseModel):
    """Where the training's curve goes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    """Without a password in it where it is stored; see `TrainingJob.write`."""
    run_id: str


def forget_handovers(folder: TrainingFolder) -> None:
    """Remove what was handed over to attempts that are over."""
    for path in folder.handover(0).parent.glob("a*.handover"):
        path.unlink(missing_ok=True)


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
        """Store it where the driver reads it; returns the file.

        What reaches MLflow (an address with a password, credentials of this process) goes into a file beside it that
        nobody else may read: specifications are looked at, copied and kept.
        """
        path, stored = self.folder.specification(self.attempt), self
        if self.tracking is not None:
            public = self.tracking.model_copy(update={"uri": redact(self.tracking.uri)})
            credentials = {name: os.environ[name] for name in CREDENTIALS if os.environ.get(name)}
            if credentials or public != self.tracking:
                secrets = {"uri": self.tracking.uri, "environment": credentials}
                write_record(self.folder.handover(self.attempt), secrets, mode=0o600)
            stored = self.model_copy(update={"tracking": public})
        stored.write_to(path)
        return path

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` stored, with what was handed over. Raises FileNotFoundError, CorruptionError or FormatError."""
        job = super().read(path)
        if job.tracking is None or (secrets := job._handed_over()) is None:
            return job
        return job.model_copy(update={"tracking": job.tracking.model_copy(update={"uri": secrets["uri"]})})

    def take_over(self) -> None:
        """Have this process know the credentials that were handed over; those that it has count more."""
        for name, value in (self._handed_over() or {"environment": {}})["environment"].items():
            os.environ.setdefault(name, value)

    def _handed_over(self) -> dict[str, Any] | None:
        try:
            return read_record(self.folder.handover(self.attempt))
        except (FileNotFoundError, PermissionError):  # there was nothing to hide, or it is hidden from this user
            return None
