"""An estimate: a measured figure with its interval, as evaluations, references and reports say it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A measured figure with its 95 % interval and the number of samples behind it."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}] (n={self.n:,})"
