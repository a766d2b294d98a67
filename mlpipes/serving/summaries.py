"""What is said of a sample and its answer in a few figures: the class, its probability, and never the sample itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlpipes.serving.model import ServedModel
from mlpipes.workloads.golden import Values

LABEL = "answer label"
"""The one column of a summary that holds texts."""
_MOST_COLUMNS = 16
"""Of a table, of which figures are kept."""
_MOST_LABEL, _LARGEST = 100, 1e30
_FEW, _DIGITS, _DIGITS_OF_FEW = 8, 6, 2
"""A figure of a few numbers may be one of them: so that it is not the sample's own, two digits are left of it."""


def summarized(model: ServedModel, values: Values, answer: Values) -> dict[str, list[Any]]:
    """Figures of samples and of the answers to them, by name: finite numbers, but for `LABEL`."""
    with np.errstate(over="ignore", invalid="ignore"):
        figures = _of_array(values) if isinstance(values, np.ndarray) else _of_table(values)
        labels, confidences = classes_in(model, answer)
        if confidences:
            figures["answer confidence"] = np.array(confidences)
        if not labels:
            figures |= _of_answer(answer)
    found: dict[str, list[Any]] = {name: _rounded(column, _DIGITS) for name, column in figures.items()}
    return found | ({LABEL: [label[:_MOST_LABEL] for label in labels]} if labels else {})


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


def _of_array(samples: np.ndarray) -> dict[str, np.ndarray]:
    """Light, contrast, extremes, and how much neighbours differ, which blur and noise change."""
    each = samples.reshape(len(samples), -1, samples.shape[-1] if samples.ndim > 1 else 1).astype(np.float64)
    steps = np.abs(np.diff(each, axis=2)) if each.shape[2] > 1 else np.zeros_like(each)
    figures = {
        "mean": each.mean((1, 2)),
        "deviation": each.std((1, 2)),
        "least": each.min((1, 2)),
        "greatest": each.max((1, 2)),
        "roughness": steps.mean((1, 2)),
    }
    digits = _DIGITS if each[0].size >= _FEW else _DIGITS_OF_FEW
    return {f"input {name}": np.array(_rounded(column, digits)) for name, column in figures.items()}


def _of_table(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    figures: dict[str, np.ndarray] = {}
    for name, column in list(columns.items())[:_MOST_COLUMNS]:
        if column.dtype.kind in "fiub":
            figures[f"input {name}"] = np.array(_rounded(column, _DIGITS_OF_FEW))
        else:
            figures |= {f"input {name}: {what}": found for what, found in _of_texts(column.tolist()).items()}
    return figures


def _of_texts(texts: Sequence[Any]) -> dict[str, np.ndarray]:
    lengths = np.array([max(1, len(str(text))) for text in texts])
    letters = np.array([sum(map(str.isalpha, str(text))) for text in texts])
    foreign = np.array([sum(character > "\x7f" for character in str(text)) for text in texts])
    words = np.array([len(str(text).split()) for text in texts])
    return {"characters": lengths, "words": words, "letters": letters / lengths, "beyond ASCII": foreign / lengths}


def _of_answer(answer: Values) -> dict[str, np.ndarray]:
    columns = {"mean": answer} if isinstance(answer, np.ndarray) else answer
    arrays = {name: np.asarray(column) for name, column in list(columns.items())[:_MOST_COLUMNS]}
    return {
        f"answer {name}": column.reshape(len(column), -1).astype(np.float64).mean(1)
        for name, column in arrays.items()
        if column.dtype.kind in "fiub"
    }


def _rounded(column: np.ndarray, digits: int) -> list[float]:
    finite = np.clip(np.nan_to_num(column.astype(np.float64)), -_LARGEST, _LARGEST)
    return [float(f"{value:.{digits}g}") for value in finite.tolist()]
