"""Checkpoints: everything needed to resume as if nothing had happened, published crash-safe and found by step.

A checkpoint is a published directory `step-00000120` with `model.safetensors`, `optimizers.pt` (tensors and plain
containers only) and, in its manifest, the progress. Random numbers and learning rates are pure functions of the position
(`determinism.mixed_seed`, `Workload.learning_rate_factor`), so position and seed stand for the state of both.
"""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlpipes.errors import CorruptionError, FormatError
from mlpipes.store.files import Published, open_published, publishing, quarantine
from mlpipes.store.layout import Store
from mlpipes.store.outcome import Best, Outcome
from mlpipes.store.status import all_statuses
from mlpipes.training.determinism import weights_digest

KIND = "checkpoint"
VERSION = 1
_NAME = re.compile(r"step-(\d+)")


class Progress(BaseModel):
    """Where a training is and what it has seen; JSON, so that it can be read without torch."""

    model_config = ConfigDict(extra="forbid")

    step: int = 0
    """Optimizer steps done."""
    seed: int = 0
    precision: str = "fp32"
    history: list[list[Any]] = []
    """Rows of (key, value, step, Unix time in ms): every curve so far, and so all metrics still to be tracked."""
    interval_losses: list[float] = []
    """Losses since the last logged point."""
    epoch_loss: float = 0.0
    """Sum of the losses of the current epoch's steps so far."""
    best: Best | None = None
    train_seconds: float = 0.0
    """Seconds spent in steps: no start-up, no evaluation, no checkpoints."""
    order_digest: str = ""
    """Chained SHA-256 of the rows that every step read."""
    loss_digest: str = ""
    """Chained SHA-256 of the loss of every step."""
    trail: list[list[Any]] = []
    """Rows of (step, order digest, loss digest), shortened, at each logged point: where two trainings part."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    published: Published

    @property
    def step(self) -> int:
        """The number of optimizer steps that it has behind it."""
        return self.progress.step

    @property
    def progress(self) -> Progress:
        """Where the training was. Raises CorruptionError if its manifest does not say it."""
        try:
            return Progress.model_validate(self.published.meta["progress"])
        except (KeyError, ValidationError) as error:
            raise CorruptionError(f"{self.published.path} has no usable progress in its manifest: {error}") from error

    def model_state(self) -> dict[str, Tensor]:
        """The model's state dict, on the CPU."""
        return load_file(self.published.path / "model.safetensors")

    def optimizer_states(self) -> list[dict[str, Any]]:
        """One state dict per optimizer, on the CPU."""
        return torch.load(self.published.path / "optimizers.pt", map_location="cpu", weights_only=True)


class Checkpoints:
    """The checkpoints of one training."""

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        self.folder, self.keep_last = folder, keep_last

    def path(self, step: int) -> Path:
        """The folder of the checkpoint after a step."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in numeric order; quarantined ones do not count."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name)))

    def save(
        self, state: Mapping[str, Tensor], optimizer_states: Sequence[Mapping[str, Any]], progress: Progress
    ) -> Path:
        """Publish a checkpoint of a model's and its optimizers' states and prune: the last `keep_last` and the best stay.

        Returns its folder.
        """
        target = self.path(progress.step)
        with publishing(target, kind=KIND, version=VERSION) as draft:
            save_file(_apart(state), draft.path / "model.safetensors")
            torch.save(list(optimizer_states), draft.path / "optimizers.pt")
            draft.meta["progress"] = progress.model_dump()
        self.prune(progress)
        return target

    def prune(self, progress: Progress) -> None:
        """Remove all but the last `keep_last` checkpoints and the best one, as of each of them.

        A checkpoint is of use only together with the best one up to then, should a later one turn out to be corrupt.
        """
        keep = set(self.steps()[-self.keep_last :]) | ({progress.best.step} if progress.best else set())
        for step in keep - {progress.step}:
            with suppress(CorruptionError, FileNotFoundError):
                best = Checkpoint(open_published(self.path(step), kind=KIND, verify=False)).progress.best
                keep |= {best.step} if best else set()
        for step in self.steps():
            if step not in keep:
                shutil.rmtree(self.path(step), ignore_errors=True)

    def remove_unfinished(self) -> None:
        """Remove what writers that were killed have left; only for who may write here."""
        for path in self.folder.glob(".tmp-*"):
            shutil.rmtree(path, ignore_errors=True)

    def load(self, step: int) -> Checkpoint:
        """The verified checkpoint after a step. Raises FileNotFoundError, FormatError or CorruptionError."""
        checkpoint = Checkpoint(open_published(self.path(step), kind=KIND, versions=frozenset({VERSION})))
        if checkpoint.step != step:
            raise CorruptionError(f"{self.path(step)} says that it is of step {checkpoint.step}: it was renamed")
        return checkpoint

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The latest usable checkpoint, or None if there never was one, and messages about unusable ones.

        A checkpoint is usable if it verifies and so does the best one that it refers to. Corrupt ones are quarantined as
        evidence. Raises CorruptionError if there are checkpoints and none is usable, and FormatError if the latest is
        another version's: starting over is the user's call.
        """
        messages = []
        steps = self.steps()
        for step in reversed(steps):
            try:
                checkpoint = self.load(step)
            except CorruptionError as error:
                messages.append(f"{error}; quarantined as {quarantine(self.path(step)).name}")
                continue
            best = checkpoint.progress.best
            if best is not None and best.step != step:
                try:
                    self.load(best.step)
                except (CorruptionError, FileNotFoundError) as error:
                    messages.append(f"step {step} is passed over, because its best checkpoint is unusable: {error}")
                    continue
            return checkpoint, messages
        # Also when an earlier attempt set them aside: a retry must not start over behind the user's back.
        if steps or (self.folder.is_dir() and any(".corrupt-" in path.name for path in self.folder.iterdir())):
            raise CorruptionError(
                f"no checkpoint in {self.folder} is usable: {'; '.join(messages) or 'all are quarantined'}. They are kept "
                "as evidence. To train from the beginning, materialize `checkpoints` with the config `fresh: true`."
            )
        return None, messages


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state's tensors on the CPU, none in the memory of another: tied weights are written once under each name."""
    taken, found = set[int](), {}
    for name, tensor in state.items():
        moved = tensor.detach().cpu().contiguous()
        memory = moved.untyped_storage().data_ptr()
        found[name] = moved.clone() if memory in taken else moved
        taken.add(memory)
    return found


def chosen_weights(folder: Path, outcome: Outcome) -> str | None:
    """The digest of the weights of the chosen epoch, which is what is exported, evaluated and compared; `folder` has the
    checkpoints. None if its checkpoint is gone or corrupt.
    """
    if outcome.best.step == outcome.steps:
        return outcome.weights_digest
    try:
        return weights_digest(Checkpoints(folder).load(outcome.best.step).model_state())
    except (FileNotFoundError, CorruptionError, FormatError):
        return None


def checkpoint_rows(store: Store, workload: str, scale: str) -> Iterator[dict[str, str]]:
    """The checkpoints of all trainings of a scale, each verified, as the cells of a table."""
    for status in all_statuses(store):
        if (status.workload, status.scale) != (workload, scale):
            continue
        checkpoints = Checkpoints(status.folder.checkpoints)
        for step in checkpoints.steps():
            row = {
                "fingerprint": status.folder.fingerprint[:12],
                "step": str(step),
                "MiB": "",
                "best": "",
                "state": "good",
            }
            try:
                found = checkpoints.load(step)
            except (CorruptionError, FormatError, FileNotFoundError) as error:
                row["state"] = f"unusable: {error}"
            else:
                best = found.progress.best
                row |= {
                    "MiB": f"{found.published.size / 2**20:.1f}",
                    "best": "yes" if best and best.step == step else "",
                }
            yield row


def prune_checkpoints(store: Store, workload: str, scale: str) -> int:
    """Remove all but the latest and the best checkpoint of each training of a scale; returns how many went.

    Raises CorruptionError, and removes nothing, where the latest one is unusable: the others may be needed.
    """
    removed = 0
    for status in all_statuses(store):
        if (status.workload, status.scale) == (workload, scale):
            checkpoints = Checkpoints(status.folder.checkpoints, keep_last=1)
            if before := checkpoints.steps():
                checkpoints.prune(checkpoints.load(before[-1]).progress)
                removed += len(before) - len(checkpoints.steps())
    return removed
