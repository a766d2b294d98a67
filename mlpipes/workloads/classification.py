"""Classification: what its task families share, whatever they classify."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlpipes.data.dataset import Columns
from mlpipes.reporting.classification import classification_report
from mlpipes.reporting.metric import Metric
from mlpipes.reporting.report import Report, Table
from mlpipes.store.calibration import Calibration
from mlpipes.workloads.base import DataInfo, Look, Workload, predicted
from mlpipes.workloads.temperature import TEMPERATURE, fit_temperature


class Classification(Workload):
    """One label of several for each sample: column `label` int64 (N,), facts `class_names`, predictions `logits` (N, C).

    Where the model's `forward` gives the logits, or what they are linear in, a finished model divides them by a temperature
    by itself; otherwise override `calibrated`, or its probabilities stay as they were trained.
    """

    metric = Metric("accuracy")

    def validate(self, predictions: Mapping[str, np.ndarray], columns: Columns) -> dict[str, float]:
        """Accuracy and mean cross-entropy."""
        logits = torch.from_numpy(predicted(predictions, "logits"))
        labels = torch.from_numpy(np.array(columns["label"]))
        return {
            "accuracy": float((logits.argmax(dim=1) == labels).double().mean()),
            "loss": float(F.cross_entropy(logits.double(), labels)),
        }

    def calibrate(self, predictions: Mapping[str, np.ndarray], columns: Columns) -> Calibration | None:
        """A temperature for the logits; None where a subclass predicts something else."""
        logits = predictions.get("logits")
        return None if logits is None else fit_temperature(logits, np.asarray(columns["label"]))

    def calibrated(self, model: nn.Module, calibration: Calibration) -> nn.Module:
        """The same model, whose `forward` divides the tensor that it returns by the temperature."""
        temperature = calibration.parameters[TEMPERATURE]

        def divide(module: nn.Module, arguments: Any, output: Any) -> Any:
            # bf16 would take near logits for equal.
            return output.float() / temperature if isinstance(output, Tensor) else output

        model.register_forward_hook(divide)
        return model

    def report(self, predictions: Mapping[str, np.ndarray], columns: Columns, info: DataInfo, look: Look) -> Report:
        """The report of a classifier, with its most confident mistakes as `shown`."""
        return classification_report(
            predictions["logits"],
            np.asarray(columns["label"]),
            info.facts["class_names"],
            lambda rows, captions: self.shown(columns, rows, captions, info),
            info.calibration,
        )

    def shown(self, columns: Columns, rows: np.ndarray, captions: Sequence[str], info: DataInfo) -> bytes | Table:
        """Mistakes for people: a PNG or a table of the given rows (B,); captions say label, prediction and confidence."""
        cells = [[int(row), caption] for row, caption in zip(rows, captions, strict=True)]
        return Table("Most confident mistakes", ["row of the split", "label → prediction"], cells)

    def scores(self, predictions: Mapping[str, np.ndarray], columns: Columns) -> np.ndarray:
        """1 where the label is right, 0 where it is not."""
        return (predictions["logits"].argmax(axis=1) == np.asarray(columns["label"])).astype(np.float32)
