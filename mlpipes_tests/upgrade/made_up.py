"""Workloads of made-up data for homes of earlier commits: each of them must be able to import this module."""

from typing import Any

import numpy as np
from torch import Tensor

from mlpipes.data.dataset import Dataset, Provenance
from mlpipes.data.ragged import Ragged
from mlpipes.data.splits import SplitPlan
from mlpipes.workloads.encoders import Tiny
from mlpipes.workloads.image_classification import DigitsHyperparameters, ImageClassification
from mlpipes.workloads.text_classification import TextRegression

MADE = Provenance("made up", "CC0", "this file", "synthetic")
DIES = 0.5
"""The label smoothing with which a training of shapes dies in its last epoch."""


class Shapes:
    """Squares of three brightnesses."""

    def load(self) -> Dataset:
        generator = np.random.default_rng(0)
        labels = np.arange(240) % 3
        images = (generator.integers(0, 60, (240, 1, 8, 8)) + 80 * labels[:, None, None, None]).astype(np.uint8)
        return Dataset(
            splits={"train": {"image": images, "label": labels.astype(np.int64)}},
            provenance=MADE,
            facts={"class_names": ["dark", "grey", "bright"], "pixel_maximum": 255},
        )


class Counts:
    """Texts, and how often each says `more`."""

    def load(self) -> Dataset:
        generator = np.random.default_rng(0)
        counts = np.arange(200) % 8
        texts = [" ".join(["more"] * n + ["less"] * (8 - n) + [f"of{i}"]) for i, n in enumerate(counts)]
        return Dataset(
            splits={"train": {"text": Ragged.of_texts(texts), "label": counts + generator.normal(0, 0.1, len(counts))}},
            provenance=MADE,
            facts={"roles": {"text": "text", "text_pair": None, "label": "label", "task": "regression"}},
        )


class MortalShapes(ImageClassification):
    """Dies in the last epoch where it is told to: a training that is left half done, with its checkpoints."""

    def loss(self, model: Any, batch: dict[str, Tensor], hp: Any) -> Tensor:
        if hp.label_smoothing == DIES and self._late:
            raise RuntimeError("told to die")
        return super().loss(model, batch, hp)

    _late = False

    def learning_rate_factor(self, progress: float, hp: Any) -> float:
        self._late = progress > 0.7
        return super().learning_rate_factor(progress, hp)


# What has a default is said all the same: defaults have changed.
SPLIT = SplitPlan(0.15, test_fraction=0.2, stratify_by="label", content=("image",))
shapes = MortalShapes(Shapes(), SPLIT, DigitsHyperparameters)
counts = TextRegression(
    Counts(),
    SplitPlan(0.15, test_fraction=0.2, content=("text",), stratify_by=None),
    Tiny(vocabulary=60, hidden=16, layers=1, intermediate=16, positions=16),
    max_length=16,
)
