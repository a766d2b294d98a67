"""The state of all trainings, read from the store alone: it answers also when Dagster and Ray are down."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpipes.errors import CorruptionError
from mlpipes.files import read_record
from mlpipes.scales import RayScaleConfig
from mlpipes.store import Store, TrainingFolder, read_messages

_SILENT_SECONDS = 60


@dataclass(frozen=True)
class TrainingStatus:
    """What is known of one training."""

    folder: TrainingFolder
    workload: str
    scale: str
    seed: int
    state: str
    """finished, failed, starting, running, stopped (by request), or silent (nothing was heard for a minute)."""
    step: int
    total_steps: int | None
    metrics: dict[str, float]
    """Latest figures: loss, samples_per_second, eta_seconds, validation metrics."""
    last_heard: float
    """Unix time of the last message."""
    checkpoint: int | None = None
    """Step of the latest checkpoint of the latest attempt, or of the one that it went on from."""
    error: str | None = None


def latest_attempt(folder: TrainingFolder) -> int:
    """The number of a training's latest attempt; 0 if there is none."""
    return max((int(path.stem[1:]) for path in folder.messages(0).parent.glob("a*.jsonl")), default=0)


def status_of(folder: TrainingFolder) -> TrainingStatus | None:
    """The status of one training, or None if its recipe cannot be read."""
    try:
        recipe = read_record(folder.recipe)
    except (FileNotFoundError, CorruptionError):
        return None
    messages, _ = read_messages(folder.messages(latest_attempt(folder)))
    state, step, total, metrics, error, last, checkpoint = "starting", 0, None, {}, None, 0.0, None
    stopped = any(message.get("kind") == "stopping" for message in messages)
    for message in messages:
        last = max(last, message.get("time", 0.0))
        kind = message.get("kind")
        if kind in ("started", "resumed", "progress", "finished"):
            state, step, total = "running", message["step"], message["total_steps"]
        if kind in ("checkpoint", "resumed"):
            checkpoint = message["step"]
        if kind == "progress":
            metrics |= {key: message[key] for key in ("loss", "samples_per_second", "eta_seconds", "epoch")}
        elif kind == "epoch":
            metrics |= {f"validation_{key}": value for key, value in message["metrics"].items()}
        elif kind == "failed":
            state, error = "failed", message["error"]
    if folder.result.is_file():
        state = "finished"
    elif state == "running" and stopped:
        state = "stopped"
    elif state in ("running", "starting") and time.time() - last > _SILENT_SECONDS:
        state = "silent"
    scale = RayScaleConfig.model_validate(recipe["scale"]).key
    return TrainingStatus(
        folder, recipe["workload"], scale, recipe["seed"], state, step, total, metrics, last, checkpoint, error
    )


def trained_scales(store: Store, workload: str) -> Iterator[str]:
    """The keys of all scales of a workload with a training in the store, each once: also of those that failed."""
    found = set()
    for path in sorted((store.root / "trainings").glob("*/")):
        try:
            recipe = read_record(TrainingFolder(path).recipe)
        except (FileNotFoundError, CorruptionError):
            continue
        key = RayScaleConfig.model_validate(recipe["scale"]).key
        if recipe["workload"] == workload and key not in found:
            found.add(key)
            yield key


def all_statuses(store: Store) -> Iterator[TrainingStatus]:
    """The status of every training in the store, the latest heard of first."""
    folders: list[Path] = sorted((store.root / "trainings").glob("*/"))
    found = [status for path in folders if (status := status_of(TrainingFolder(path)))]
    yield from sorted(found, key=lambda status: -status.last_heard)


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
        "ETA s": f"{metrics['eta_seconds']:.0f}" if status.state == "running" and "eta_seconds" in metrics else "–",
        "checkpoint": str(status.checkpoint) if status.checkpoint else "–",
        "fingerprint": status.folder.fingerprint[:12],
    }


def checkpoint_rows(store: Store, workload: str, scale: str) -> Iterator[dict[str, str]]:
    """The checkpoints of all trainings of a scale, each verified, as the cells of a table."""
    from mlpipes.training.checkpoints import Checkpoints

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
            except (CorruptionError, FileNotFoundError) as error:
                row["state"] = f"unusable: {error}"
            else:
                best = found.progress.best
                row |= {
                    "MiB": f"{found.published.size / 2**20:.1f}",
                    "best": "yes" if best and best["step"] == step else "",
                }
            yield row


def prune_checkpoints(store: Store, workload: str, scale: str) -> int:
    """Remove all but the latest and the best checkpoint of each training of a scale; returns how many went.

    Raises CorruptionError, and removes nothing, where the latest one is unusable: the others may be needed.
    """
    from mlpipes.training.checkpoints import Checkpoints

    removed = 0
    for status in all_statuses(store):
        if (status.workload, status.scale) == (workload, scale):
            checkpoints = Checkpoints(status.folder.checkpoints, keep_last=1)
            if before := checkpoints.steps():
                checkpoints.prune(checkpoints.load(before[-1]).progress)
                removed += len(before) - len(checkpoints.steps())
    return removed
