"""Summaries of samples and answers."""

from collections.abc import Mapping

import numpy as np

from mlpipes.serving.model import ServedModel
from mlpipes.workloads.golden import Values


def classes_in(model: ServedModel, answer: Values) -> tuple[list[str], list[float]]:
    """The class that each answer says, and its probability; empty where answers are no classes."""
    if isinstance(answer, np.ndarray):
        names = model.about.get("class_names")
        if not names or answer.shape[1:] != (len(names),):
            return [], []
        shares = np.exp(answer - answer.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return [str(names[place]) for place in answer.argmax(axis=1)], shares.max(axis=1).tolist()
    if "label" not in answer:
        return [], []
    return [str(label) for label in answer["label"]], _greatest(answer)


def _greatest(answer: Mapping[str, np.ndarray]) -> list[float]:
    shares = [np.asarray(column) for name, column in answer.items() if name.startswith("p(")]
    return np.max(shares, axis=0).tolist() if shares else []
