"""Comparison: how much better one model is than another, with a 95 % interval and, on the same samples, a test."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mlpipes.reporting.report import Estimate


def mean_of(figures: np.ndarray) -> Estimate:
    """The mean of a figure of each sample, float (N,), with its 95 % interval by Student's t; one sample has no width."""
    from scipy import stats

    values = figures.astype(np.float64)
    n, value = len(values), float(values.mean())
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5) if n > 1 else 0.0
    return Estimate(value, value - half, value + half, n)


@dataclass(frozen=True)
class Difference:
    """The second model's figure minus the first one's."""

    value: float
    low: float
    high: float
    p_value: float | None
    """Two-sided; None where only intervals are known."""
    n: int
    method: str

    def __str__(self) -> str:
        p = "" if self.p_value is None else f", p={self.p_value:.3g}"
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}] (n={self.n:,}{p}; {self.method})"

    def is_worse(self, significance: float) -> bool:
        """Whether the second model is worse by more than chance explains."""
        return self.value < 0 and self.p_value is not None and self.p_value < significance


def paired(first: np.ndarray, second: np.ndarray) -> Difference:
    """Two models on the same samples; `first` and `second` are scores (N,) of which greater is better.

    Scores of 0 and 1: McNemar's exact test (1947, doi:10.1007/BF02295996) with the interval of Bonett and Price (2012,
    doi:10.3102/1076998611411915). Others: Student's t on the differences. Raises ValueError for unequal lengths.
    """
    if first.shape != second.shape:
        raise ValueError(f"scores of {first.shape} and {second.shape} are not of the same samples")
    from scipy import stats

    n = len(first)
    if np.isin(np.concatenate([first, second]), (0, 1)).all():
        won, lost = int(((first == 0) & (second == 1)).sum()), int(((first == 1) & (second == 0)).sum())
        p = float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
        up, down = (won + 1) / (n + 2), (lost + 1) / (n + 2)
        half = stats.norm.ppf(0.975) * np.sqrt((up + down - (up - down) ** 2) / (n + 2))
        low, high = max(-1.0, up - down - half), min(1.0, up - down + half)
        return Difference((won - lost) / n, float(low), float(high), p, n, "McNemar, exact")
    change = second.astype(np.float64) - first.astype(np.float64)
    if np.allclose(change, change[0], rtol=1e-9, atol=1e-12):  # no spread, no t
        value = float(change[0])
        return Difference(value, value, value, 1.0 if value == 0 else 0.0, n, "paired, all alike")
    found: Any = stats.ttest_1samp(change, 0.0)
    interval = found.confidence_interval(0.95)
    return Difference(
        float(change.mean()), float(interval.low), float(interval.high), float(found.pvalue), n, "paired t"
    )


def unpaired(first: Estimate, second: Estimate) -> Difference:
    """Two models on different samples, from their intervals alone (Zou and Donner 2008, doi:10.1002/sim.3095)."""
    value = second.value - first.value
    low = value - float(np.hypot(second.value - second.low, first.high - first.value))
    high = value + float(np.hypot(second.high - second.value, first.value - first.low))
    return Difference(value, low, high, None, min(first.n, second.n), "from intervals")
