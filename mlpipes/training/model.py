"""The model: the best checkpoint by validation as a verified file, and its evaluation on a split."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mlpipes.data.snapshot import Snapshot
from mlpipes.errors import ConfigError
from mlpipes.reporting.report import Report
from mlpipes.store.calibration import Calibration
from mlpipes.store.files import digest_of, open_published, publishing
from mlpipes.store.layout import TrainingFolder
from mlpipes.store.outcome import Outcome
from mlpipes.store.recipe import Recipe
from mlpipes.training.checkpoints import Checkpoints
from mlpipes.training.code_version import export_version
from mlpipes.training.determinism import mixed_seed, random_numbers_from, weights_digest
from mlpipes.training.parallel import SingleWorker
from mlpipes.training.prediction import outputs_of, predictions_of
from mlpipes.workloads.base import DataInfo, Deployable, Workload
from mlpipes.workloads.catalog import load_workload
from mlpipes.workloads.deployables import TorchProgram
from mlpipes.workloads.served import served_predictions, served_rows
from mlpipes.workloads.tensors import compute_fp32_in_full, on_device

KIND = "model"
VERSION = 1
VALIDATION = "validation"
_NOT_APPLIED = (
    "not calibrated, for what `predict` gives does not follow from the model that `calibrated` returns as it should; "
    "override `calibrated`"
)
_SAME_LOSS = 1e-3
"""How far, relatively, the loss of calibrated outputs may lie from what the fit has said."""


@dataclass(frozen=True)
class TrainedModel:
    """A model with all that is needed to use it."""

    recipe: Recipe
    workload: Workload
    hp: Any
    network: nn.Module
    meta: dict[str, Any]
    """`step`, `epoch`, validation `metrics`, `weights_digest`, `precision`."""
    calibration: Calibration | None
    """How its outputs are corrected, which `network` does; None: its workload does not, or it is of before that was done."""

    @property
    def exported_digest(self) -> str:
        """Of all that what is served depends on: weights, calibration, and the code that makes it of them."""
        parameters = self.calibration.parameters if self.calibration else {}
        code = export_version(self.recipe.implementation)
        return digest_of({"weights": self.meta["weights_digest"], "calibration": parameters, "code": code})

    def info(self, snapshot: Snapshot) -> DataInfo:
        """What its workload may know about the data, and the calibration."""
        facts, statistics = snapshot.facts, snapshot.meta["statistics"]
        return DataInfo(facts, statistics, snapshot.files, self.calibration, self.meta["precision"])


def export_best(folder: TrainingFolder, recipe: Recipe, outcome: Outcome) -> Path:
    """Publish the weights of the best checkpoint by validation as `model/`; returns the folder.

    Raises CorruptionError if the checkpoint does not verify.
    """
    best = outcome.best
    state = Checkpoints(folder.checkpoints).load(best.step).model_state()
    with publishing(folder.model, kind=KIND, version=VERSION) as draft:
        save_file(state, draft.path / "model.safetensors")
        draft.meta.update(
            recipe=recipe.model_dump(mode="json"),
            **best.model_dump(),
            weights_digest=weights_digest(state),
            precision=outcome.precision,
        )
    return folder.model


def open_model(folder: Path) -> dict[str, Any]:
    """The description of a published model. Raises FileNotFoundError, or CorruptionError if a byte has changed."""
    return open_published(folder, kind=KIND, versions=frozenset({VERSION})).meta


def load_model(folder: Path, snapshot: Snapshot) -> TrainedModel:
    """A published model on the best device of this machine, calibrated as it was when it was registered.

    Raises CorruptionError if a byte has changed.
    """
    try:
        calibration = Calibration.read(TrainingFolder(folder.parent).calibration)
    except FileNotFoundError:
        calibration = None
    return _loaded(folder, snapshot, calibration)


def calibrated_model(folder: Path, snapshot: Snapshot) -> TrainedModel:
    """A published model, calibrated anew on the validation split; nothing is recorded.

    Where the workload's `calibrated` does not do to its `predict` what the fit has assumed, outputs stay as they were
    trained, and the calibration's note says so.
    """
    model = _loaded(folder, snapshot, None)
    found = _calibration_of(model, snapshot)
    if found is None or not found.parameters:
        return replace(model, calibration=found)
    calibrated = _loaded(folder, snapshot, found)
    seen = _calibration_of(calibrated, snapshot)
    said, done = found.after, None if seen is None else seen.before
    if said is not None and done is not None and math.isclose(said, done, rel_tol=_SAME_LOSS, abs_tol=_SAME_LOSS**2):
        return calibrated
    left = found.model_copy(update={"parameters": {}, "after": None, "note": _NOT_APPLIED})
    return _loaded(folder, snapshot, left)


def _calibration_of(model: TrainedModel, snapshot: Snapshot) -> Calibration | None:
    columns = snapshot.columns(VALIDATION)
    moved = on_device(columns, next(model.network.parameters()).device)
    predictions = predictions_of(
        model.workload, model.network, moved, model.hp, SingleWorker(), model.meta["precision"]
    )
    return model.workload.calibrate(predictions, columns)


def _loaded(folder: Path, snapshot: Snapshot, calibration: Calibration | None) -> TrainedModel:
    published = open_published(folder, kind=KIND, versions=frozenset({VERSION}))
    recipe = Recipe.model_validate(published.meta["recipe"])
    workload = load_workload(recipe.implementation)
    hp = workload.hyperparameters.model_validate(recipe.hyperparameters)
    # As when training began: a workload may keep only what training changes.
    info = DataInfo(snapshot.facts, snapshot.meta["statistics"], snapshot.files)
    with random_numbers_from(mixed_seed(recipe.seed, "model")):
        network = workload.build_model(hp, info)
    workload.load_state(network, load_file(folder / "model.safetensors"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute_fp32_in_full()
    network.to(device).eval()
    if calibration is not None and calibration.parameters:
        network = workload.calibrated(network, calibration)
    return TrainedModel(recipe, workload, hp, network, published.meta, calibration)


def evaluate(model: TrainedModel, snapshot: Snapshot, split: str) -> tuple[Report, np.ndarray]:
    """The report of a model on a split of a snapshot, and the score of each sample (N,).

    Raises ConfigError if the workload's report lacks its metric, or holds what is not finite, as a score may not be either.
    """
    workload, network, hp, precision = model.workload, model.network, model.hp, model.meta["precision"]
    columns = snapshot.columns(split)
    moved = on_device(columns, next(network.parameters()).device)
    predictions = served_predictions(workload, network, moved, hp, precision)

    def look(rows: np.ndarray) -> Mapping[str, np.ndarray]:
        numbers = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int64))  # torch has no negative strides
        return outputs_of(workload, network, moved, numbers, hp, precision)

    report = workload.report(predictions, columns, model.info(snapshot), look)
    scores = np.asarray(workload.scores(predictions, columns))
    _assert_comparable(report, scores, workload.metric.name, snapshot.counts[split])
    return report, scores


def _assert_comparable(report: Report, scores: np.ndarray, metric: str, rows: int) -> None:
    """What is NaN is neither worse nor better than anything: it would pass the gates that compare."""
    if metric not in report.estimates:
        raise ConfigError(
            f"the report estimates {', '.join(report.estimates)}, but not the workload's metric, {metric!r}"
        )
    numbers = {name: (e.value, e.low, e.high) for name, e in report.estimates.items()}
    numbers |= {name: (value,) for name, value in report.quantities.items()}
    if wrong := [f"{name} is {found}" for name, found in numbers.items() if not np.isfinite(found).all()]:
        raise ConfigError(
            f"in the report, {wrong[0]}, which is not finite. Where this split does not define it, leave it out"
        )
    if scores.shape != (rows,):
        raise ConfigError(f"`scores` gives the shape {scores.shape}; of {rows:,} samples, it must be ({rows},)")
    if bad := int((~np.isfinite(scores)).sum()):
        raise ConfigError(
            f"{bad:,} of {rows:,} `scores` are not finite: give each sample a number, such as a bounded one"
        )


def deployable(model: TrainedModel, snapshot: Snapshot) -> Deployable:
    """What to deploy of a model, on the CPU, with examples from the training split."""
    workload, info = model.workload, model.info(snapshot)
    found = workload.deployable(model.network.cpu(), model.hp, info, snapshot.columns("train"))
    if isinstance(found, TorchProgram):
        return replace(found, rows=served_rows(workload, model.hp), precision=info.precision)
    return found


def predict_texts(
    model: TrainedModel, snapshot: Snapshot, texts: Sequence[str], pairs: Sequence[str] | None
) -> dict[str, Sequence[Any]]:
    """A text model's answers to new texts (or pairs), by column. Raises ConfigError for another kind of model."""
    from mlpipes.workloads.text_classification import TextWorkload

    workload = model.workload
    if not isinstance(workload, TextWorkload):
        raise ConfigError(f"{model.recipe.workload} does not read texts; use its registered MLflow model")
    if ("types" in snapshot.meta["columns"] or "text_pair" in snapshot.meta["columns"]) != (pairs is not None):
        raise ConfigError(f"{model.recipe.workload} reads {'single texts' if pairs is not None else 'pairs of texts'}")
    info = model.info(snapshot)
    columns = on_device(workload.raw_columns(texts, pairs, info), next(model.network.parameters()).device)
    outputs = served_predictions(workload, model.network, columns, model.hp, model.meta["precision"])
    return workload.answers(outputs, info)
