"""Classification: what its task families share, whatever they classify."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from mlpipes.data.dataset import Columns
from mlpipes.reporting.classification import classification_report
from mlpipes.reporting.metric import Metric
from mlpipes.reporting.report import Report, Table
from mlpipes.workloads.base import DataInfo, Look, Workload, predicted


class Classification(Workload):
    """One label of several for each sample: column `label` int64 (N,), facts `class_names`, predictions `logits` (N, C)."""

    metric = Metric("accuracy")

    def validate(self, predictions: Mapping[str, np.ndarray], columns: Columns) -> dict[str, float]:
        """Accuracy and mean cross-entropy."""
        logits = torch.from_numpy(predicted(predictions, "logits"))
        labels = torch.from_numpy(np.array(columns["label"]))
        return {
            "accuracy": float((logits.argmax(dim=1) == labels).double().mean()),
            "loss": float(F.cross_entropy(logits.double(), labels)),
        }

    def report(self, predictions: Mapping[str, np.ndarray], columns: Columns, info: DataInfo, look: Look) -> Report:
        """The report of a classifier, with its most confident mistakes as `shown`."""
        return classification_report(
            predictions["logits"],
            np.asarray(columns["label"]),
            info.facts["class_names"],
            lambda rows, captions: self.shown(columns, rows, captions, info),
        )

    def shown(self, columns: Columns, rows: np.ndarray, captions: Sequence[str], info: DataInfo) -> bytes | Table:
        """Mistakes for people: a PNG or a table of the given rows (B,); captions say label, prediction and confidence."""
        cells = [[int(row), caption] for row, caption in zip(rows, captions, strict=True)]
        return Table("Most confident mistakes", ["row of the split", "label → prediction"], cells)

    def scores(self, predictions: Mapping[str, np.ndarray], columns: Columns) -> np.ndarray:
        """1 where the label is right, 0 where it is not."""
        return (predictions["logits"].argmax(axis=1) == np.asarray(columns["label"])).astype(np.float32)
