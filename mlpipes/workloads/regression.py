"""Regression: what its task families share, whatever they predict numbers for."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlpipes.data.dataset import Columns
from mlpipes.errors import DataError, TrainingFailedError
from mlpipes.reporting.metric import Metric
from mlpipes.reporting.regression import regression_report
from mlpipes.reporting.report import Report, Table
from mlpipes.workloads.base import DataInfo, Look, Workload, predicted


class Regression(Workload):
    """A number for each sample: column `label` float64 (N,), predictions `value` (N,) in the labels' unit.

    Under autocast a network may answer in bf16, which has three digits: `.float()` before its answer is put to that unit.
    """

    # Not a correlation, which sees neither size nor place: best of all may be what is always near the mean.
    metric = Metric("root_mean_squared_error", higher_is_better=False)

    def statistics(self, train: Columns) -> dict[str, Any]:
        """Mean and standard deviation of the labels, in which a model had better think."""
        if "label" not in train:
            raise DataError(f"a regression needs a column `label`; the data have {', '.join(train)}")
        labels = np.asarray(train["label"], dtype=np.float64)
        if labels.ndim != 1 or not np.isfinite(labels).all():
            raise DataError(
                f"the labels of a regression are numbers (N,), without gaps; these are of shape {labels.shape}, with "
                f"{int((~np.isfinite(labels)).sum()):,} that are not finite"
            )
        # Of equal labels, the deviation is 0 but for rounding.
        constant = np.ptp(labels) == 0
        return {"label_mean": float(labels.mean()), "label_std": 1.0 if constant else float(labels.std())}

    def validate(self, predictions: Mapping[str, np.ndarray], columns: Columns) -> dict[str, float]:
        """Root mean squared error, Pearson's correlation, and the mean squared error as the loss."""
        values, labels = predicted(predictions, "value").astype(np.float64), np.asarray(columns["label"])
        if values.shape != labels.shape:  # NumPy would compare each with each
            raise TrainingFailedError(
                f"the predictions `value` are of shape {values.shape}, the labels of {labels.shape}; both must be (N,)"
            )
        constant, loss = np.ptp(values) == 0 or np.ptp(labels) == 0, float(((values - labels) ** 2).mean())
        return {
            "root_mean_squared_error": loss**0.5,
            "pearson": 0.0 if constant else float(np.corrcoef(values, labels)[0, 1]),
            "loss": loss,
        }

    def report(self, predictions: Mapping[str, np.ndarray], columns: Columns, info: DataInfo, look: Look) -> Report:
        """Correlations and errors against the baseline of the training mean, with the widest misses as `shown`."""
        return regression_report(
            predictions["value"],
            np.asarray(columns["label"]),
            info.statistics["label_mean"],
            lambda rows, captions: self.shown(columns, rows, captions),
        )

    def shown(self, columns: Columns, rows: np.ndarray, captions: Sequence[str]) -> Table:
        """The widest misses for people: a table of the given rows (B,); captions say label and prediction."""
        cells = [[int(row), caption] for row, caption in zip(rows, captions, strict=True)]
        return Table("Widest misses", ["row of the split", "label → prediction"], cells)

    def scores(self, predictions: Mapping[str, np.ndarray], columns: Columns) -> np.ndarray:
        """The squared error, negative."""
        return -((predictions["value"].astype(np.float64) - np.asarray(columns["label"])) ** 2)
