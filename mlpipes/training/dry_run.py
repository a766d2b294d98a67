"""A dry run: every method of a workload is called on a handful of rows before the first step of a training.

An author's mistake in a report would show after the last step otherwise, when all the hours are spent. Nothing that the
training has is changed: a model of its own is built, and random numbers are put back.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlpipes.data.dataset import Columns
from mlpipes.errors import TrainingFailedError, UserError
from mlpipes.reporting.report import Estimate, Report
from mlpipes.store.calibration import Calibration
from mlpipes.store.files import write_record
from mlpipes.training.determinism import mixed_seed, random_numbers_from
from mlpipes.training.disk_full import is_disk_full
from mlpipes.training.loop import Trainer
from mlpipes.training.parallel import SingleWorker
from mlpipes.training.prediction import outputs_of, predictions_of
from mlpipes.workloads.base import DataInfo, Workload
from mlpipes.workloads.deployables import PythonCode, TorchProgram
from mlpipes.workloads.entry import cause_of
from mlpipes.workloads.served import served_predictions
from mlpipes.workloads.tensors import autocast, on_device

TRAINED, EVALUATED, MORE = 8, 32, 2000
"""Rows that are trained on, rows that are evaluated, and rows for figures that so few do not define."""

_SAID = 600
"""Characters of torch's error in ours."""
LATEST = 1 - 2**-30
"""Progress behind which no training has a step."""


@contextmanager
def faults_named(workload: Workload, name: str, known: Callable[[Exception], str | None]) -> Iterator[None]:
    """An error in here of a method of the workload becomes a TrainingFailedError that names workload, method and line.

    Errors for users get the workload's name; those of which `known` says something pass as they are, and so do the engine's.
    """
    try:
        yield
    except UserError as error:
        raise type(error)(f"{name}: {error}") from error
    except Exception as error:
        method = _method_called(workload, error)
        if method is None or known(error) is not None:
            raise
        raise TrainingFailedError(f"{name}: `{method}` raised {cause_of(error)}") from error


def _method_called(workload: Workload, error: Exception) -> str | None:
    """The method of the workload that the engine had called when the error came."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_locals.get("self") is workload:
            return trace.tb_frame.f_code.co_name
        trace = trace.tb_next
    return None


class DryRun:
    """The dry run of a trainer that has not begun, on its device. Raises TrainingFailedError for what does not hold."""

    def __init__(self, trainer: Trainer, info: DataInfo, train: Columns) -> None:
        self.trainer, self.info, self.train = trainer, info, train
        self.workload, self.hp, self.device = trainer.workload, trainer.hp, trainer.device
        self.seed = mixed_seed(trainer.progress.seed, "model")

    def run_once(self, passed: Path) -> None:
        """Run, unless a file says that this was passed; it is written then. A dry run takes seconds, and scales are many."""
        if passed.is_file():
            return
        self.run()
        with suppress(OSError):  # a disk that is full has better occasions to say so
            passed.parent.mkdir(parents=True, exist_ok=True)
            write_record(passed, {"time": time.time()})

    def run(self) -> None:
        """All of it, in the order in which a training comes to it."""
        with random_numbers_from(self.seed):
            model = self._model()
            self._step(model)
            try:
                calibration = self._evaluate(model, EVALUATED)
            except Exception:
                # Figures may not be defined for so few rows, a correlation or a class that is not there.
                calibration = self._evaluate(model, MORE)
            self._deploy(model, calibration)

    @staticmethod
    def _wrong(method: str, what: str) -> TrainingFailedError:
        return TrainingFailedError(f"`{method}` {what}")

    def _model(self) -> nn.Module:
        """A model of its own, equal to the trainer's if what is kept of one is enough to come back."""
        with random_numbers_from(self.seed):
            model = self.workload.build_model(self.hp, self.info)
        state = {name: tensor.detach().clone() for name, tensor in self.workload.state(self.trainer.model).items()}
        self.workload.load_state(model, state)
        model.to(self.device)
        columns, _ = self._rows(EVALUATED)
        first, second = (self._predictions(each, columns) for each in (self.trainer.model, model))
        for name, values in first.items():
            size = float(np.abs(values).max(initial=0))
            if np.isfinite(values).all() and not np.allclose(values, second[name], rtol=0.05, atol=0.05 * size):
                raise self._wrong(
                    "load_state",
                    f"gives another model than the one whose `state` it was: their predictions {name!r} differ, and so "
                    "would those of a resumed training",
                )
        return model

    def _rows(self, count: int) -> tuple[dict[str, Any], int]:
        """Rows of validation, from all of it; and how many."""
        columns = self.trainer.validation_columns
        total = len(next(iter(columns.values())))
        picked = np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64))
        return {name: column[picked] for name, column in columns.items()}, len(picked)

    def _predictions(self, model: nn.Module, columns: Columns) -> dict[str, np.ndarray]:
        moved = on_device(columns, self.device)
        with random_numbers_from(self.seed):
            return predictions_of(self.workload, model, moved, self.hp, SingleWorker(), self.trainer.progress.precision)

    def _step(self, model: nn.Module) -> None:
        workload, hp, trainer = self.workload, self.hp, self.trainer
        shard = trainer.order.batch(0, 0).tensor_split(trainer.gradient.shards)[0]
        parts = workload.micro_batches(trainer.train_columns, shard, hp)
        if not torch.equal(torch.cat([part.cpu() for part in parts]), shard):
            raise self._wrong("micro_batches", "does not give the rows that it got, each once and in order")
        model.train()
        optimizers = workload.optimizers(model, hp)
        if not optimizers or not all(isinstance(each, torch.optim.Optimizer) for each in optimizers):
            raise self._wrong("optimizers", f"gives {optimizers!r}; it must give a sequence of torch's optimizers")
        for progress in (0.0, LATEST):
            self._backward(model, parts[0][:TRAINED], progress)
            factor = workload.learning_rate_factor(progress, hp)
            if not isinstance(factor, float | int) or not math.isfinite(factor):
                raise self._wrong("learning_rate_factor", f"gives {factor!r} at {progress}; it must give a number")
        limit = workload.gradient_clip(hp)
        if limit is not None and not limit > 0:
            raise self._wrong("gradient_clip", f"gives {limit!r}; it must give a number above 0, or None")
        for optimizer in optimizers:
            optimizer.load_state_dict(optimizer.state_dict())

    def _backward(self, model: nn.Module, rows: Tensor, progress: float) -> None:
        """Batch, loss and gradient as they are at a fraction of the steps."""
        workload, trainer = self.workload, self.trainer
        hp = workload.stage(progress, self.hp)
        if type(hp) is not type(self.hp):
            raise self._wrong("stage", f"gives {type(hp).__name__}; it must give a {type(self.hp).__name__}")
        if progress and hp == workload.stage(0.0, self.hp):
            return  # nothing that has not been tried
        with autocast(self.device, trainer.progress.precision):
            with autocast(self.device, "fp32"):
                batch = workload.batch(trainer.train_columns, rows, hp, augment=True)
            loss, weight = workload.loss(model, batch, hp), workload.weight(batch, hp)
        for method, found in (("loss", loss), ("weight", weight)):
            if found is not None and (not isinstance(found, Tensor) or found.numel() != 1):
                shape = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                raise self._wrong(method, f"gives {shape}; it must give one number, summed over the batch's samples")
        if not loss.requires_grad:
            raise self._wrong("loss", "does not depend on any weight that is trained")
        loss.backward()

    def _evaluate(self, model: nn.Module, count: int) -> Calibration | None:
        """What the workload's `calibrate` gives."""
        workload, (columns, rows) = self.workload, self._rows(count)
        predictions, moved = self._predictions(model, columns), on_device(columns, self.device)
        self._check_metrics(workload.validate(predictions, columns))
        few = on_device({name: column[np.arange(min(rows, 2))] for name, column in columns.items()}, self.device)
        with random_numbers_from(self.seed):
            served = served_predictions(workload, model, few, self.hp, self.trainer.progress.precision)
        if (shapes := _shapes(served)) != _shapes(predictions):
            raise self._wrong(
                "served_batch", f"leads to predictions {shapes}; those of `batch` are {_shapes(predictions)}"
            )
        calibration = workload.calibrate(predictions, columns)
        if calibration is not None and not isinstance(calibration, Calibration):
            raise self._wrong("calibrate", f"gives {type(calibration).__name__}; it must give a `Calibration`, or None")

        def look(wanted: np.ndarray) -> Mapping[str, np.ndarray]:
            numbers = torch.from_numpy(np.ascontiguousarray(wanted, dtype=np.int64))
            return outputs_of(workload, model, moved, numbers, self.hp, self.trainer.progress.precision)

        look(np.arange(min(rows, 2)))
        self._check_report(workload.report(predictions, columns, self.info, look))
        scores = np.asarray(workload.scores(predictions, columns))
        if scores.shape != (rows,) or not np.issubdtype(scores.dtype, np.number):
            raise self._wrong(
                "scores",
                f"gives {scores.dtype} of shape {scores.shape} for {rows} samples; it must give a number for each",
            )
        return calibration

    def _check_metrics(self, metrics: Any) -> None:
        metric = self.workload.metric.name
        if not isinstance(metrics, Mapping):
            raise self._wrong("validate", f"gives {type(metrics).__name__}; it must give a dictionary of numbers")
        if missing := [name for name in (metric, "loss") if name not in metrics]:
            raise self._wrong(
                "validate",
                f"gives {', '.join(metrics) or 'nothing'}, but no {missing[0]!r}; it must give `loss` and the workload's "
                f"metric, {metric!r}",
            )
        for name, value in metrics.items():
            if not isinstance(value, float | int | np.number):
                raise self._wrong("validate", f"gives {type(value).__name__} for {name!r}; it must give a number")
        self.workload.selection_key({name: float(value) for name, value in metrics.items()})

    def _check_report(self, report: Any) -> None:
        metric = self.workload.metric.name
        if not isinstance(report, Report):
            raise self._wrong("report", f"gives {type(report).__name__}; it must give a `Report`")
        if not isinstance(report.estimates.get(metric), Estimate):
            raise self._wrong(
                "report",
                f"has estimates of {', '.join(report.estimates) or 'nothing'}, but none of the workload's metric, "
                f"{metric!r}; gates and champion go by it",
            )
        for name, picture in report.figures.items():
            if not isinstance(picture, bytes):
                raise self._wrong(
                    "report", f"has {type(picture).__name__} as figure {name!r}; it must be a PNG, as bytes"
                )
        try:
            json.dumps(report.as_dict())
            report.markdown("dry run", {})
        except Exception as error:
            raise self._wrong("report", f"cannot be written as JSON and Markdown: {error}") from error

    def _deploy(self, model: nn.Module, calibration: Calibration | None) -> None:
        model = model.eval().cpu()
        if calibration is not None and calibration.parameters:
            model = self.workload.calibrated(model, calibration)
            if not isinstance(model, nn.Module):
                raise self._wrong("calibrated", f"gives {type(model).__name__}; it must give a model")
        found = self.workload.deployable(model, self.hp, replace(self.info, calibration=calibration), self.train)
        if not callable(getattr(found, "log", None)):
            raise self._wrong("deployable", f"gives {type(found).__name__}; it must give what has a method `log`")
        if isinstance(found, TorchProgram):
            with torch.no_grad():
                try:
                    answer = found.module.cpu().eval()(torch.from_numpy(found.example))
                except Exception as error:
                    raise self._wrong(
                        "deployable", f"gives a program that does not take its example: {error}"
                    ) from error
            if not isinstance(answer, Tensor) or len(answer) != len(found.example):
                raise self._wrong("deployable", "gives a program that does not answer with a row for each sample")
            self._export(found)
        elif isinstance(found, PythonCode):
            self._write(found)

    def _write(self, model: PythonCode) -> None:
        """Its files, as MLflow will get them at the end."""
        if not model.code.is_file():
            raise self._wrong("deployable", f"names {model.code} as its code; there is no such file")
        with tempfile.TemporaryDirectory(prefix="mlpipes-model-") as folder:
            try:
                model.write(Path(folder))
            except Exception as error:
                if is_disk_full(error, Path(folder), 0):
                    raise  # which is none of the author's mistakes
                raise self._wrong("deployable", f"gives a model that cannot be written: {cause_of(error)}") from error

    def _export(self, program: TorchProgram) -> None:
        """As MLflow will at the end: 0.3 to 1 CPU-seconds for the networks that come with mlpipes."""
        try:
            torch.export.export(
                program.module.to(memory_format=program.memory_format),  # pyright: ignore[reportCallIssue]
                (torch.from_numpy(program.example),),
                dynamic_shapes=[{0: torch.export.Dim.AUTO}],
            )
        except Exception as error:
            said = " ".join(str(error).split())
            raise self._wrong("deployable", f"gives a program that torch cannot export: {said[:_SAID]}") from error


def _shapes(predictions: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Of one sample."""
    return {name: values.shape[1:] for name, values in predictions.items()}
