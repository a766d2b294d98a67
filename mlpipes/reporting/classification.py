"""The report of a classifier: accuracy with its interval, per-class table, confusion, calibration, mistakes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from mlpipes.reporting import figures
from mlpipes.reporting.report import Estimate, Report, Table
from mlpipes.store.calibration import Calibration

ECE_BINS = 15
MISTAKES = 24
RESAMPLES = 1000
SHOWN_CLASSES = 50


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
    show_mistakes: Callable[[np.ndarray, Sequence[str]], bytes | Table],
    calibration: Calibration | None = None,
) -> Report:
    """The report of predictions `logits` float (N, C) against `labels` int (N,).

    `show_mistakes(rows, captions)` shows the rows that were most confidently wrong, as a picture or a table. `calibration`
    says by which temperature the logits have been divided; confidence without it is shown beside.
    """
    from sklearn import metrics

    probabilities: np.ndarray = probabilities_of(logits)
    predicted = probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1)
    correct = predicted == labels
    n = len(labels)
    temperature = None if calibration is None else calibration.parameters.get("temperature")
    versions = [_confidence("as trained", probabilities, labels)]
    if temperature is not None:
        before = _confidence("as trained", probabilities_of(logits.astype(np.float64) * temperature), labels)
        versions = [before, _confidence(f"calibrated, T = {temperature:g}", probabilities, labels)]
    wrong = np.flatnonzero(~correct).tolist()
    worst = sorted(wrong, key=lambda row: -confidence[row])[:MISTAKES]
    captions = [f"{names[labels[i]]} → {names[predicted[i]]} {confidence[i]:.0%}" for i in worst]
    titles = {f"{each.title}: ECE {each.error:.3f}": each.values for each in versions}
    pictures = {"calibration": figures.reliability(titles, correct, ECE_BINS)}
    shown = [_per_class(labels, predicted, names)]
    if len(names) <= SHOWN_CLASSES:
        confusion: np.ndarray = metrics.confusion_matrix(labels, predicted, labels=range(len(names)))
        pictures = {"confusion": figures.confusion_matrix(confusion, names)} | pictures
    columns = ["probabilities", "expected calibration error", "mean confidence", "negative log-likelihood"]
    rows = [[v.title, v.error, float(v.values.mean()), v.loss] for v in versions]
    shown.append(Table("Calibration", columns, rows))
    if worst:
        mistakes = show_mistakes(np.asarray(worst), captions)
        if isinstance(mistakes, Table):
            shown.append(mistakes)
        else:
            pictures["mistakes"] = mistakes
    majority = int(np.bincount(labels, minlength=len(names)).max())
    return Report(
        estimates={
            "accuracy": wilson(int(correct.sum()), n),
            **_bootstrapped(labels, predicted, len(names)),
        },
        tables=shown,
        figures=pictures,
        quantities={"baseline": majority / n} | _quantities(versions, temperature),
        notes=[
            f"{len(wrong)} of {n:,} wrong; always the most frequent class would be right in {majority / n:.1%}. Intervals: "
            f"Wilson score for accuracy, percentiles of {RESAMPLES:,} bootstrap resamples for macro F1 and Matthews "
            "correlation, which are degenerate where nothing was wrong.",
            *([f"Calibration: {calibration}."] if calibration is not None else []),
        ],
    )


@dataclass(frozen=True)
class _Confidence:
    """How sure some probabilities are, and how well that says what is right."""

    title: str
    values: np.ndarray
    """Of each sample's most probable class, float64 (N,)."""
    error: float
    loss: float


def _confidence(title: str, probabilities: np.ndarray, labels: np.ndarray) -> _Confidence:
    from sklearn import metrics

    values = probabilities.max(axis=1)
    error = expected_calibration_error(values, probabilities.argmax(axis=1) == labels)
    return _Confidence(
        title, values, error, float(metrics.log_loss(labels, probabilities, labels=range(probabilities.shape[1])))
    )


def _quantities(versions: Sequence[_Confidence], temperature: float | None) -> dict[str, float]:
    """Figures of the probabilities that are served (the last ones), and of those as trained where these differ."""
    found = {"expected_calibration_error": versions[-1].error, "negative_log_likelihood": versions[-1].loss}
    if temperature is None:
        return found
    first = versions[0]
    return found | {
        "temperature": temperature,
        "expected_calibration_error_as_trained": first.error,
        "negative_log_likelihood_as_trained": first.loss,
    }


def _per_class(labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> Table:
    from sklearn import metrics

    found: Any = metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(len(names)), zero_division=cast(Any, 0)
    )
    rows = [[name, float(p), float(r), float(f), int(s)] for name, p, r, f, s in zip(names, *found, strict=True)]
    title = "Per class"
    if len(rows) > SHOWN_CLASSES:
        title = f"Per class, the {SHOWN_CLASSES} of {len(rows):,} with the lowest F1"
        rows = sorted((row for row in rows if row[4]), key=lambda row: (row[3], -row[4]))[:SHOWN_CLASSES]
    return Table(title, ["class", "precision", "recall", "f1", "n"], rows)


def _bootstrapped(labels: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, Estimate]:
    """Macro F1 and Matthews correlation (its form for several classes: Gorodkin 2004) with their intervals."""
    # Everything follows from how often each pair (label, prediction) occurs; resampling samples with replacement is
    # drawing these counts from a multinomial. Only pairs that occur are kept: with many classes they are few.
    pairs, counts = np.unique(labels * classes + predicted, return_counts=True)
    truth, guess = pairs // classes, pairs % classes
    n = len(labels)

    def measure(counts: np.ndarray) -> tuple[float, float]:
        hits = np.bincount(truth[truth == guess], counts[truth == guess], classes)
        true_totals, guess_totals = np.bincount(truth, counts, classes), np.bincount(guess, counts, classes)
        macro_f1 = (2 * hits / np.maximum(true_totals + guess_totals, 1)).mean()
        covariance = hits.sum() * n - true_totals @ guess_totals
        spread = (n**2 - guess_totals @ guess_totals) * (n**2 - true_totals @ true_totals)
        return float(macro_f1), float(covariance / np.sqrt(spread)) if spread > 0 else 0.0

    values = measure(counts)
    draws = np.random.default_rng(0).multinomial(n, counts / n, size=RESAMPLES)
    lows, highs = np.quantile([measure(draw) for draw in draws], [0.025, 0.975], axis=0)
    names = ("macro_f1", "matthews_correlation")
    return {
        name: Estimate(value, float(low), float(high), n)
        for name, value, low, high in zip(names, values, lows, highs, strict=True)
    }
