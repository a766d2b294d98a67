"""The judgement of a classifier: accuracy with its interval, per-class table, confusion, calibration, mistakes."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from mlpipes.reporting import figures
from mlpipes.reporting.report import Estimate, Report, Table

ECE_BINS = 15
MISTAKES = 24


def probabilities_of(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis; float64 (N, C)."""
    from scipy.special import softmax

    return softmax(logits.astype(np.float64), axis=-1)


def wilson(successes: int, n: int) -> Estimate:
    """A proportion with its 95 % Wilson score interval (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return Estimate(successes / n, float(interval.low), float(interval.high), n)


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = ECE_BINS) -> float:
    """Mean gap between confidence and accuracy over equal-width bins, weighted by samples (Guo et al. 2017, 1706.04599).

    `confidence` float (N,) in [0, 1], `correct` bool (N,).
    """
    which = np.clip((confidence * bins).astype(int), 0, bins - 1)
    gaps = np.abs(np.bincount(which, correct, bins) - np.bincount(which, confidence, bins))
    return float(gaps.sum() / len(confidence))


def classification_report(
    logits: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    picture_of_mistakes: Callable[[np.ndarray, Sequence[str]], bytes],
) -> Report:
    """The report of predictions `logits` float (N, C) against `labels` int (N,).

    `picture_of_mistakes(rows, captions)` draws the rows that were most confidently wrong.
    """
    from sklearn import metrics

    probabilities: np.ndarray = probabilities_of(logits)
    predicted = probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1)
    correct = predicted == labels
    n = len(labels)
    low, high, macro_f1 = _bootstrapped_macro_f1(labels, predicted, len(names))
    ece = expected_calibration_error(confidence, correct)
    per_class: Any = metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(len(names)), zero_division=cast(Any, 0)
    )
    confusion: np.ndarray = metrics.confusion_matrix(labels, predicted, labels=range(len(names)))
    wrong = np.flatnonzero(~correct).tolist()
    worst = sorted(wrong, key=lambda row: -confidence[row])[:MISTAKES]
    captions = [f"{names[labels[i]]} → {names[predicted[i]]} {confidence[i]:.0%}" for i in worst]
    pictures = {
        "confusion": figures.confusion_matrix(confusion, names),
        "calibration": figures.reliability(confidence, correct, ece, ECE_BINS),
    }
    if len(worst):
        pictures["mistakes"] = picture_of_mistakes(np.asarray(worst), captions)
    return Report(
        estimates={
            "accuracy": wilson(int(correct.sum()), n),
            "macro_f1": Estimate(macro_f1, low, high, n),
        },
        tables=[
            Table(
                "Per class",
                ["class", "precision", "recall", "f1", "n"],
                [
                    [name, float(p), float(r), float(f), int(s)]
                    for name, p, r, f, s in zip(names, *per_class, strict=True)
                ],
            ),
            Table(
                "Calibration",
                ["expected calibration error", "mean confidence", "negative log-likelihood"],
                [
                    [
                        ece,
                        float(confidence.mean()),
                        float(metrics.log_loss(labels, probabilities, labels=range(len(names)))),
                    ]
                ],
            ),
        ],
        figures=pictures,
        notes=[
            f"{len(wrong)} of {n:,} wrong. Intervals: Wilson score for accuracy, bootstrap (1,000 resamples) for macro F1, "
            "which is degenerate where nothing was wrong.",
        ],
    )


def _bootstrapped_macro_f1(labels: np.ndarray, predicted: np.ndarray, classes: int) -> tuple[float, float, float]:
    def macro_f1(matrix: np.ndarray) -> np.ndarray:
        hits = np.diagonal(matrix, axis1=-2, axis2=-1)
        totals = matrix.sum(axis=-1) + matrix.sum(axis=-2)
        return (2 * hits / np.maximum(totals, 1)).mean(axis=-1)

    counts = np.bincount(labels * classes + predicted, minlength=classes * classes)
    # Resampling samples with replacement is drawing confusion counts from a multinomial: no loop over samples.
    draws = np.random.default_rng(0).multinomial(counts.sum(), counts / counts.sum(), size=1000)
    low, high = np.quantile(macro_f1(draws.reshape(-1, classes, classes)), [0.025, 0.975])
    return float(low), float(high), float(macro_f1(counts.reshape(classes, classes)))
