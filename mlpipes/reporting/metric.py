"""A metric: the name of a figure that people look at first, and which way it is better."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One of a workload's validation metrics, which its test report estimates under the same name."""

    name: str
    higher_is_better: bool = True

    def __str__(self) -> str:
        return self.name if self.higher_is_better else f"{self.name} (lower is better)"

    def score(self, value: float) -> float:
        """A value as a number of which the greater is the better."""
        return value if self.higher_is_better else -value
