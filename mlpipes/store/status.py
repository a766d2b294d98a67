"""The state of all trainings, read from the store alone: it answers also when Dagster and Ray are down."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mlpipes.errors import ConfigError, CorruptionError, FormatError
from mlpipes.scales import RayScaleConfig
from mlpipes.store.files import read_record
from mlpipes.store.layout import Store, TrainingFolder
from mlpipes.store.messages import (
    CheckpointSaved,
    EpochEnded,
    Failed,
    Finished,
    Message,
    Progressed,
    Resumed,
    Started,
    Stopping,
    Waits,
    Warned,
    read_messages,
)
from mlpipes.store.references import TrainingReference
from mlpipes.store.training_job import TrainingJob

_SILENT_SECONDS = 60
_MESSAGES = re.compile(r"a(\d+)\.jsonl")


class TrainingState(StrEnum):
    """How a training stands."""

    STARTING = "starting"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"
    """By request, with a last checkpoint."""
    WAITING = "waiting"
    """For nodes, a queue or an image; `reason` says what for."""
    SILENT = "silent"
    """Nothing was heard for a minute."""


@dataclass(frozen=True)
class TrainingStatus:
    """What is known of one training."""

    folder: TrainingFolder
    workload: str
    scale: str
    seed: int
    state: TrainingState
    step: int
    total_steps: int | None
    metrics: dict[str, float]
    """Latest figures: loss, samples_per_second, eta_seconds, validation metrics."""
    last_heard: float
    """Unix time of the last message."""
    checkpoint: int | None = None
    """Step of the latest checkpoint of the latest attempt, or of the one that it went on from."""
    error: str | None = None
    reason: str = ""
    """What a waiting training waits for."""


def latest_attempt(folder: TrainingFolder) -> int:
    """The number of a training's latest attempt; 0 if there is none."""
    names = (_MESSAGES.fullmatch(path.name) for path in folder.messages(0).parent.glob("a*.jsonl"))
    return max((int(name[1]) for name in names if name), default=0)  # also beside somebody's copies


class _Reading:
    """What was read of one training's messages so far: those of a million steps are not read again for each look."""

    def __init__(self, folder: TrainingFolder) -> None:
        self.folder = folder
        self._described: tuple[str, str, int] | None = None
        self._begin(0)

    def _begin(self, attempt: int) -> None:
        self.attempt, self.offset = attempt, 0
        self.state, self.step, self.total, self.checkpoint = TrainingState.STARTING, 0, None, None
        self.metrics: dict[str, float] = {}
        self.error: str | None = None
        self.stopping, self.reason, self.last = False, "", 0.0

    def status(self) -> TrainingStatus | None:
        """The status now, or None if the recipe cannot be read."""
        self._described = self._described or _described(self.folder)  # what is there once never changes
        if self._described is None:
            return None
        if (attempt := latest_attempt(self.folder)) != self.attempt:
            self._begin(attempt)
        messages, self.offset = read_messages(self.folder.messages(attempt), self.offset)
        for message in messages:
            self._note(message)
        state = self.state
        if self.folder.result.is_file():
            state = TrainingState.FINISHED
        elif state != TrainingState.FAILED and self.reason:
            state = TrainingState.WAITING
        elif state == TrainingState.RUNNING and self.stopping:
            state = TrainingState.STOPPED
        elif state in (TrainingState.RUNNING, TrainingState.STARTING) and time.time() - self.last > _SILENT_SECONDS:
            state = TrainingState.SILENT
        figures = (state, self.step, self.total, dict(self.metrics), self.last, self.checkpoint, self.error)
        return TrainingStatus(self.folder, *self._described, *figures, reason=self.reason)

    def _note(self, message: Message) -> None:
        self.last = max(self.last, message.time)
        if isinstance(message, Waits):
            self.reason = message.reason
        elif not isinstance(message, Warned):
            self.reason = ""
        if isinstance(message, Started | Resumed | Progressed | Finished):
            self.state, self.step, self.total = TrainingState.RUNNING, message.step, message.total_steps
        if isinstance(message, CheckpointSaved | Resumed):
            self.checkpoint = message.step
        if isinstance(message, Progressed):
            self.metrics |= message.model_dump(include={"loss", "samples_per_second", "eta_seconds", "epoch"})
        elif isinstance(message, EpochEnded):
            self.metrics |= {f"validation_{name}": value for name, value in message.metrics.items()}
        elif isinstance(message, Failed):
            self.state, self.error = TrainingState.FAILED, message.error
        if isinstance(message, Stopping | Started):  # on other pods or nodes, the attempt may start again
            self.stopping = isinstance(message, Stopping)


class Statuses:
    """The status of every training in a store, for whoever looks again and again: each look reads only what is new."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._readings: dict[Path, _Reading] = {}

    def latest(self) -> list[TrainingStatus]:
        """As they are now, the latest heard of first."""
        folders = sorted((self._store.root / "trainings").glob("*/"))
        self._readings = {path: self._readings.get(path) or _Reading(TrainingFolder(path)) for path in folders}
        found = [status for reading in self._readings.values() if (status := reading.status())]
        return sorted(found, key=lambda status: -status.last_heard)


def all_statuses(store: Store) -> list[TrainingStatus]:
    """The status of every training in the store, the latest heard of first."""
    return Statuses(store).latest()


def _described(folder: TrainingFolder) -> tuple[str, str, int] | None:
    """Workload, scale and seed of a training; None if its recipe is not there, corrupt, or of a form unknown here."""
    try:
        recipe = read_record(folder.recipe)
        return recipe["workload"], RayScaleConfig.model_validate(recipe["scale"]).key, recipe["seed"]
    except (FileNotFoundError, CorruptionError, KeyError, ValidationError):
        return None


def trained_scales(store: Store, workload: str) -> Iterator[str]:
    """The keys of all scales of a workload with a training in the store, each once: also of those that failed."""
    found = set()
    for path in sorted((store.root / "trainings").glob("*/")):
        described = _described(TrainingFolder(path))
        if described is not None and described[0] == workload and described[1] not in found:
            found.add(described[1])
            yield described[1]


def progress_text(status: TrainingStatus) -> dict[str, Any]:
    """A status as the cells of a table."""
    metrics = status.metrics
    return {
        "workload": status.workload,
        "scale": status.scale,
        "seed": str(status.seed),
        "state": status.state,
        "step": f"{status.step}/{status.total_steps}" if status.total_steps else "–",
        "epoch": f"{metrics['epoch']:.1f}" if "epoch" in metrics else "–",
        "loss": f"{metrics['loss']:.4f}" if "loss" in metrics else "–",
        "samples/s": f"{metrics['samples_per_second']:,.0f}" if "samples_per_second" in metrics else "–",
        "ETA s": f"{metrics['eta_seconds']:.0f}"
        if status.state == TrainingState.RUNNING and "eta_seconds" in metrics
        else "–",
        "checkpoint": str(status.checkpoint) if status.checkpoint else "–",
        "fingerprint": status.folder.fingerprint[:12],
    }


def find_training(store: Store, workload: str, scale: str, run: str | None = None) -> TrainingFolder:
    """A scale's finished training: the one materialized last, or the one that `run` names.

    `run` is the beginning of a fingerprint, of an MLflow run's id or of a Dagster run's id. Raises ConfigError if there
    is none, or more than one.
    """
    if run is None:
        reference = store.read_reference(TrainingReference, workload, scale)
        if reference is None:
            raise ConfigError(
                f"{workload} {scale} has not been trained yet; materialize {workload}/checkpoints first, in the UI or by "
                f"`mlpipes backfill {workload} --scale {scale}`"
            )
        return store.training(reference.fingerprint)
    found = []
    for path in sorted(store.root.glob("trainings/*/recipe.json")):
        folder = TrainingFolder(path.parent)
        described = _described(folder)
        if described and described[:2] == (workload, scale) and any(name.startswith(run) for name in _names(folder)):
            found.append(folder)
    if len(found) != 1:
        listed = ", ".join(folder.fingerprint[:12] for folder in found) or "none"
        raise ConfigError(f"{run!r} should name one training of {workload} {scale}; it names {listed}")
    return found[0]


def _names(folder: TrainingFolder) -> Iterator[str]:
    yield folder.fingerprint
    for path in folder.specification(0).parent.glob("a*.json"):
        try:
            job = TrainingJob.read(path)
        except (CorruptionError, FormatError):
            continue
        yield job.requested_by
        if job.tracking is not None:
            yield job.tracking.run_id
