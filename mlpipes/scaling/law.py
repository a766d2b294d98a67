"""The scaling law: throughput over workers, fitted with its uncertainty, and what it forecasts for scales not run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEAST_SCALES = 3
"""Different numbers of workers below which nothing is fitted: two points and two parameters leave no uncertainty."""


@dataclass(frozen=True)
class Forecast:
    """Samples per second at a number of workers, with the 95 % interval in which one measurement is expected."""

    workers: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ScalingLaw:
    """Throughput X(N) = λN / (1 + σ(N − 1) + κN(N − 1)).

    With κ = 0 this is Amdahl's law (1967), otherwise Gunther's universal scalability law (arXiv:0808.1431).
    """

    single: float
    """λ: samples per second of one worker."""
    contention: float
    """σ: the share of the work that is not parallel."""
    coherency: float
    """κ: what each pair of workers costs."""
    covariance: np.ndarray
    """Of (log λ, σ, κ), float (3, 3); zero for what was not fitted."""
    residual: float
    """Standard deviation of one measurement's logarithm around the law."""
    degrees: int
    """Measurements minus fitted parameters."""

    @property
    def name(self) -> str:
        """The law's name."""
        return "universal scalability law" if self.coherency else "Amdahl's law"

    def interval(self, parameter: int) -> tuple[float, float]:
        """The 95 % interval of λ (0), σ (1) or κ (2)."""
        middle = [np.log(self.single), self.contention, self.coherency][parameter]
        half = self._quantile * np.sqrt(self.covariance[parameter, parameter])
        low, high = float(middle - half), float(middle + half)
        return (float(np.exp(low)), float(np.exp(high))) if parameter == 0 else (max(0.0, low), high)

    def forecast(self, workers: int) -> Forecast:
        """What is expected at a number of workers."""
        gradient = _gradient(np.array([workers]), self.contention, self.coherency)[0]
        spread = float(np.sqrt(gradient @ self.covariance @ gradient + self.residual**2))
        value = self.single * float(_capacity(np.array([workers]), self.contention, self.coherency)[0])
        factor = float(np.exp(self._quantile * spread))
        return Forecast(workers, value, value / factor, value * factor)

    def text(self) -> str:
        """The law in words, with its uncertainty."""
        low, high = self.interval(1)
        text = f"{self.name}: {self.contention:.1%} of the work is not parallel [{low:.1%}, {min(high, 1):.1%}]"
        return text + (f", each pair of workers costs {self.coherency:.2g}" if self.coherency else "")

    @property
    def _quantile(self) -> float:
        from scipy import stats

        return float(stats.t.ppf(0.975, self.degrees))


def fit_scaling_law(workers: Sequence[int], throughput: Sequence[float]) -> ScalingLaw | None:
    """The law of measured samples per second; None for fewer than three different numbers of workers.

    Fitted to logarithms, for noise is in proportion. κ is kept only if four or more measurements say that it is not zero.
    """
    count, rates = np.asarray(workers, dtype=np.float64), np.log(np.asarray(throughput, dtype=np.float64))
    if len(set(workers)) < LEAST_SCALES:
        return None
    if len(set(workers)) > LEAST_SCALES:
        law = _fit(count, rates, with_coherency=True)
        if law.coherency > 0 and law.interval(2)[0] > 0:
            return law
    return _fit(count, rates, with_coherency=False)


def _capacity(n: Any, contention: float, coherency: float) -> Any:
    return n / (1 + contention * (n - 1) + coherency * n * (n - 1))


def _gradient(n: np.ndarray, contention: float, coherency: float) -> np.ndarray:
    """Of log X by (log λ, σ, κ), float (N, 3)."""
    below = 1 + contention * (n - 1) + coherency * n * (n - 1)
    return np.stack([np.ones(len(n)), -(n - 1) / below, -n * (n - 1) / below], axis=1)


def _fit(n: np.ndarray, rates: np.ndarray, *, with_coherency: bool) -> ScalingLaw:
    from scipy.optimize import least_squares

    used = 3 if with_coherency else 2

    def full(parameters: np.ndarray) -> np.ndarray:
        return np.concatenate([parameters, np.zeros(3 - used)])

    def residuals(parameters: np.ndarray) -> np.ndarray:
        single, contention, coherency = full(parameters)
        return single + np.log(_capacity(n, contention, coherency)) - rates

    start = np.array([rates[n.argmin()] - np.log(n.min()), 0.05, 0.001][:used])
    bounds = (np.array([-np.inf, 0, 0][:used]), np.array([np.inf, 1, 1][:used]))
    found = least_squares(
        residuals, start, bounds=bounds, x_scale=np.array([1, 0.1, 0.01][:used]), xtol=1e-12, ftol=1e-12
    )
    single, contention, coherency = full(found.x)
    degrees = len(n) - used
    variance = float((found.fun**2).sum()) / degrees
    jacobian = _gradient(n, contention, coherency)[:, :used]
    covariance = np.zeros((3, 3))
    covariance[:used, :used] = variance * np.linalg.pinv(jacobian.T @ jacobian)
    return ScalingLaw(
        float(np.exp(single)), float(contention), float(coherency), covariance, float(np.sqrt(variance)), degrees
    )
