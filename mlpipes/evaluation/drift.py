"""Drift: whether what is served looks otherwise than what was evaluated, figure by figure, by more than chance explains."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Figures = Mapping[str, np.ndarray]
"""By name, a figure or a label of each sample (N,)."""
_LEAST_EXPECTED = 5.0
"""Of a cell of the χ² test: rarer labels are taken together."""


@dataclass(frozen=True)
class DriftLimits:
    """When something counts as drift."""

    significance: float = 0.01
    """Probability of a false alarm, of all figures together."""
    least_effect: float = 0.1
    """Smaller differences are none, however certain: of cumulative shares, or of the shares of labels."""
    least_samples: int = 100
    """Of fewer, on either side, nothing is said."""


@dataclass(frozen=True)
class Moved:
    """How far a figure's distribution lies from that of the evaluation."""

    name: str
    statistic: float
    """0 to 1: Kolmogorov and Smirnov's of numbers, of labels half the sum of the differences between shares."""
    p_value: float
    moved: bool


@dataclass(frozen=True)
class Drift:
    """What was found."""

    evaluated: int
    served: int
    """Samples."""
    threshold: float
    """Of each p-value: Bonferroni's, so that all together give a false alarm as rarely as is said."""
    figures: tuple[Moved, ...] = ()
    note: str = ""
    """Why nothing is compared; empty where it is."""

    @property
    def moved(self) -> list[Moved]:
        """What has moved, the farthest first."""
        return sorted((each for each in self.figures if each.moved), key=lambda each: -each.statistic)

    def __str__(self) -> str:
        if self.note:
            return f"not compared: {self.note}"
        found = ", ".join(f"{each.name} by {each.statistic:.2f} (p={each.p_value:.2g})" for each in self.moved)
        what = f"moved: {found}" if found else f"none of {len(self.figures)} figures has moved"
        return f"{what}; {self.served:,} samples served against {self.evaluated:,} of the evaluation"


def drift(evaluated: Figures, served: Figures, limits: DriftLimits) -> Drift:
    """Compare what was served with what was evaluated; nothing is said of too few samples, or of other figures."""
    one_count, other_count = (len(next(iter(each.values()), ())) for each in (evaluated, served))
    names = [name for name in evaluated if name in served]
    threshold = limits.significance / max(1, len(names))
    if min(one_count, other_count) < limits.least_samples or not names:
        few = f"{other_count:,} samples served and {one_count:,} evaluated, {limits.least_samples:,} of each are wanted"
        note = few if names else "nothing was served, or it was kept in other figures"
        return Drift(one_count, other_count, threshold, note=note)
    found = []
    for name in names:
        one, other = np.asarray(evaluated[name]), np.asarray(served[name])
        statistic, p = _of_numbers(one, other) if one.dtype.kind in "fiub" else _of_labels(one, other)
        found.append(Moved(name, statistic, p, p <= threshold and statistic >= limits.least_effect))
    return Drift(one_count, other_count, threshold, tuple(found))


def _of_numbers(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    from scipy import stats

    found = stats.ks_2samp(one, other, method="asymp")  # with ties, it is on the safe side
    return float(found.statistic), float(found.pvalue)  # pyright: ignore[reportAttributeAccessIssue]


def _of_labels(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    from scipy import stats

    labels = np.unique(np.concatenate([one, other]))
    table = np.array([[(side == label).sum() for label in labels] for side in (one, other)], dtype=np.float64)
    shares = table / table.sum(1, keepdims=True)
    distance = float(np.abs(shares[0] - shares[1]).sum() / 2)
    expected = table.sum(0) * table.sum(1).min() / table.sum()
    rare = expected < _LEAST_EXPECTED
    table = np.concatenate([table[:, ~rare], table[:, rare].sum(1, keepdims=True)], axis=1)
    table = table[:, table.sum(0) > 0]
    if table.shape[1] < 2:
        return distance, 1.0
    return distance, float(stats.chi2_contingency(table, correction=False).pvalue)  # pyright: ignore[reportAttributeAccessIssue]
