"""The report of a regression: correlations and errors with intervals, and the widest misses."""

from collections.abc import Callable, Sequence

import numpy as np

from mlpipes.reporting import figures
from mlpipes.reporting.report import Estimate, Report, Table

RESAMPLES = 1000
MISSES = 24


def regression_report(
    values: np.ndarray,
    labels: np.ndarray,
    training_mean: float,
    table_of_misses: Callable[[np.ndarray, Sequence[str]], Table],
) -> Report:
    """The report of predictions `values` float (N,) against `labels` float (N,).

    The baseline is the root mean squared error of who always says the mean of the training labels. Intervals are percentiles
    of 1,000 bootstrap resamples of the samples (Efron 1979). `table_of_misses(rows, captions)` shows the rows with the
    greatest errors.
    """
    from scipy.stats import rankdata

    values, labels = values.astype(np.float64), labels.astype(np.float64)
    ranks = rankdata(values), rankdata(labels)
    generator, n = np.random.default_rng(0), len(labels)
    draws = [generator.integers(0, n, n) for _ in range(RESAMPLES)]

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0

    def estimate(measure: Callable[[np.ndarray], float]) -> Estimate:
        low, high = np.quantile([measure(rows) for rows in draws], [0.025, 0.975])
        return Estimate(measure(np.arange(n)), float(low), float(high), n)

    error = values - labels
    baseline = float(np.sqrt(((labels - training_mean) ** 2).mean()))
    worst = np.argsort(-np.abs(error), kind="stable")[:MISSES]
    captions = [f"{labels[row]:.3g} → {values[row]:.3g}" for row in worst]
    return Report(
        estimates={
            "root_mean_squared_error": estimate(lambda rows: float(np.sqrt((error[rows] ** 2).mean()))),
            "mean_absolute_error": estimate(lambda rows: float(np.abs(error[rows]).mean())),
            "pearson": estimate(lambda rows: correlation(values[rows], labels[rows])),
            "spearman": estimate(lambda rows: correlation(ranks[0][rows], ranks[1][rows])),
        },
        tables=[table_of_misses(worst, captions)],
        quantities={"baseline": baseline},
        figures={"predictions": figures.scatter(labels, values)},
        notes=[
            f"Always the mean of the training labels would have a root mean squared error of {baseline:.4f}. Errors are in "
            "the labels' unit. Intervals: percentiles of 1,000 bootstrap resamples. Spearman's resamples keep the ranks of "
            "all samples."
        ],
    )
