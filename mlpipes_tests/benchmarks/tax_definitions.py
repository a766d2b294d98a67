"""The project's definitions for the benchmark `tax`: paragraphs whose batches are clocked by who makes them."""

import copy
import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mlpipes.definitions import build_defs
from mlpipes.workloads import text_classification
from mlpipes.workloads.base import Batch
from mlpipes.workloads.catalog import configured
from mlpipes.workloads.encoders import Tiny

FOLDER, BATCHES, SHARDS = "TAX_FOLDER", "TAX_BATCHES_AN_EPOCH", 4
"""Environment variables: where figures go, and how many batches (of one logical shard each) an epoch has."""
EPOCHS = 1
_BEGIN = 80
"""Batches that are not clocked: the first ones take longer, and some were tried before the training."""


class Clocked(text_classification.TextClassification):
    """Notes how long the process, and its thread that trains, have computed when an epoch ends, before its evaluation."""

    count, spent, trained, clocked = 0, 0.0, 0.0, 0
    last = last_trained = 0.0

    def batch(self, columns: Mapping[str, Any], rows: Tensor, hp: Any, *, augment: bool) -> Batch:
        """As ever."""
        if augment:
            self._tick(int(os.environ[BATCHES]))
        return super().batch(columns, rows, hp, augment=augment)

    def _tick(self, an_epoch: int) -> None:
        now, trained = time.process_time(), time.thread_time()
        if self.count > _BEGIN:
            self.spent, self.clocked = self.spent + now - self.last, self.clocked + 1
            self.trained += trained - self.last_trained
        self.last, self.last_trained, self.count = now, trained, self.count + 1
        if self.count == EPOCHS * an_epoch:
            figures = {"cpu_seconds": self.spent, "trained": self.trained, "batches": self.clocked}
            Path(os.environ[FOLDER], f"{os.getpid()}.json").write_text(json.dumps(figures), encoding="utf-8")


docstrings = copy.copy(text_classification.docstrings)
docstrings.__class__ = Clocked
docstrings.encoder = Tiny(layers=6)  # an epoch, in which nothing is evaluated, is to last for half a minute
_OURS = {"docstrings": f"{__name__}:docstrings"}
defs = build_defs(catalog=[replace(e, implementation=_OURS.get(e.name, e.implementation)) for e in configured()])
"""The workload `docstrings`, clocked; all others as they are."""
