"""Classification: what its task families share, whatever they classify."""

from collections.abc import Mapping

import numpy as np
import torch
from torch.nn import functional as F

from mlpipes.data.dataset import Columns
from mlpipes.reporting.metric import Metric
from mlpipes.workloads.base import Workload


class Classification(Workload):
    """One label of several for each sample: column `label` int64 (N,), facts `class_names`, predictions `logits` (N, C)."""

    metric = Metric("accuracy")

    def validate(self, predictions: Mapping[str, np.ndarray], columns: Columns) -> dict[str, float]:
        """Accuracy and mean cross-entropy."""
        logits, labels = torch.from_numpy(predictions["logits"]), torch.from_numpy(np.array(columns["label"]))
        return {
            "accuracy": float((logits.argmax(dim=1) == labels).double().mean()),
            "loss": float(F.cross_entropy(logits.double(), labels)),
        }

    def scores(self, predictions: Mapping[str, np.ndarray], columns: Columns) -> np.ndarray:
        """1 where the label is right, 0 where it is not."""
        return (predictions["logits"].argmax(axis=1) == np.asarray(columns["label"])).astype(np.float32)
