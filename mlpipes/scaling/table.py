"""Scaling: what more workers bought and cost, what the law behind it forecasts, and which scale to take."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlpipes.reporting.metric import Metric
from mlpipes.reporting.report import Estimate, Table
from mlpipes.scales import RayScaleConfig
from mlpipes.scaling.law import ScalingLaw, fit_scaling_law
from mlpipes.store.outcome import Usage

ACCURACY = Metric("accuracy")


@dataclass(frozen=True)
class ScaleResult:
    """One scale's finished training and its evaluation."""

    scale: RayScaleConfig
    snapshot: str
    code: str
    validation: float
    test: Estimate
    train_seconds: float
    samples_per_second: float
    weights_digest: str
    comparable: str
    """What must be equal for two trainings to be the same work: all of the recipe but the workers."""
    samples: int = 0
    usage: Usage | None = None
    metric: Metric = ACCURACY
    """What `validation` and `test` are."""


@dataclass(frozen=True)
class Prices:
    """What an hour of a device costs, in any currency; a worker's devices are its GPUs, or its CPUs if it has none."""

    gpu_hour: float | None = None
    cpu_hour: float | None = None

    def cost(self, scale: RayScaleConfig, seconds: float) -> float | None:
        """The cost of a scale's workers for some seconds; None without a price."""
        price = self.gpu_hour if scale.gpus_per_worker else self.cpu_hour
        return None if price is None else price * device_hours(scale, seconds)


def device_hours(scale: RayScaleConfig, seconds: float) -> float:
    """Hours of all GPUs of a scale together, or of all CPUs if it uses no GPU."""
    return scale.workers * (scale.gpus_per_worker or scale.cpus_per_worker) * seconds / 3600


def scaling_rows(results: Sequence[ScaleResult], prices: Prices | None = None) -> list[dict[str, Any]]:
    """One row a scale: figures, and speed-up and efficiency against the fewest workers that did the same work.

    Speed-up is the ratio of samples per second; efficiency is speed-up over the ratio of workers. Both are None where no
    other scale did the same work (same data, batch size, epochs, hyperparameters, seed and code).
    """
    rows = []
    for result in results:
        same = [other for other in results if other.comparable == result.comparable]
        baseline = min(same, key=lambda other: other.scale.workers)
        alone, usage = len(same) == 1, result.usage
        speed_up = result.samples_per_second / baseline.samples_per_second
        rows.append(
            {
                "scale": result.scale.key,
                "workers": result.scale.workers,
                "epochs": result.scale.epochs,
                "validation": result.validation,
                **asdict(result.test),
                "train_seconds": result.train_seconds,
                "samples_per_second": result.samples_per_second,
                "baseline": None if alone else baseline.scale.key,
                "speed_up": None if alone else speed_up,
                "efficiency": None if alone else speed_up * baseline.scale.workers / result.scale.workers,
                "device_hours": device_hours(result.scale, result.train_seconds),
                "cost": (prices or Prices()).cost(result.scale, result.train_seconds),
                "cpu_utilisation": usage and usage.cpu_seconds_per_second / result.scale.workers,
                "gpu_utilisation": usage and usage.gpu_utilisation,
                "peak_memory_bytes": usage and usage.peak_memory_bytes,
                "peak_gpu_memory_bytes": usage and usage.peak_gpu_memory_bytes,
                "weights_digest": result.weights_digest,
                "snapshot": result.snapshot,
                "code": result.code,
                "comparable": result.comparable,
                "pareto": False,
                # The greater the better, whatever the metric: what scales are ranked by.
                "score": result.metric.score(result.test.value),
                "validation_score": result.metric.score(result.validation),
            }
        )
    for row in rows:
        row["pareto"] = not any(_dominates(other, row) for other in rows if _together(other) == _together(row))
    return rows


def _together(row: Mapping[str, Any]) -> tuple[str, str]:
    """Figures of other data or other code are never compared."""
    return row["snapshot"], row["code"]


def _dominates(other: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    better = other["score"] >= row["score"] and other["device_hours"] <= row["device_hours"]
    return better and (other["score"], other["device_hours"]) != (row["score"], row["device_hours"])


VAGUE_SHARE = 0.5
"""Width of the interval of the share of work that is not parallel from which on a law says nothing."""
VAGUE_FACTOR = 10.0
"""Ratio of a forecast's bounds beyond which it says nothing."""


@dataclass(frozen=True)
class Law:
    """The scaling law of the scales that did the same work, and what it says of scales that were not run."""

    law: ScalingLaw
    scales: Sequence[str]
    forecasts: Sequence[Mapping[str, Any]]
    """Rows: `scale`, `workers`, `samples_per_second`, `low`, `high`, `train_seconds`, `device_hours`, `cost`."""

    def says_something(self) -> bool:
        """Whether the measurements tell enough for the law and its forecasts to be shown."""
        low, high = self.law.interval(1)
        return high - low <= VAGUE_SHARE and all(row["high"] <= VAGUE_FACTOR * row["low"] for row in self.forecasts)

    def markdown(self) -> str:
        """The law and its forecasts, or that there is not enough to tell."""
        scales = ", ".join(self.scales)
        if not self.says_something():
            return f"Not enough to tell how throughput grows with workers, from {scales}: run more scales."
        law = f"Law of {scales}: {self.law.text()}, 95 % intervals."
        return f"{law}\n\nForecast, not measured:\n\n{forecast_table(self).markdown()}" if self.forecasts else law


def laws_of(
    results: Sequence[ScaleResult], not_run: Sequence[RayScaleConfig], prices: Prices | None = None
) -> list[Law]:
    """A law for each kind of work that three or more scales did; forecasts for those of `not_run` of the same shape."""
    found = []
    for comparable in dict.fromkeys(result.comparable for result in results):
        same = [result for result in results if result.comparable == comparable]
        law = fit_scaling_law([r.scale.workers for r in same], [r.samples_per_second for r in same])
        if law is None:
            continue
        first, greatest = same[0], max(same, key=lambda r: r.scale.workers)
        wanted = [scale for scale in not_run if _shape(scale) == _shape(first.scale)]
        twice = greatest.scale.workers * 2
        if first.scale.batch_size % twice == 0 and all(scale.workers != twice for scale in wanted):
            wanted.append(greatest.scale.model_copy(update={"workers": twice}))
        rows = []
        for scale in wanted:
            speed = law.forecast(scale.workers)
            seconds = first.samples / speed.value
            rows.append(
                {
                    "scale": scale.key,
                    "workers": scale.workers,
                    "samples_per_second": speed.value,
                    "low": speed.low,
                    "high": speed.high,
                    "train_seconds": seconds,
                    "device_hours": device_hours(scale, seconds),
                    "cost": (prices or Prices()).cost(scale, seconds),
                }
            )
        found.append(Law(law, [result.scale.key for result in same], rows))
    return found


def _shape(scale: RayScaleConfig) -> tuple[Any, ...]:
    return scale.batch_size, scale.epochs, scale.gpus_per_worker, scale.cpus_per_worker


def recommend(
    rows: Sequence[Mapping[str, Any]], deadline_seconds: float | None = None, budget: float | None = None
) -> tuple[Mapping[str, Any] | None, str]:
    """The best scale by validation of those that were run within a deadline and a budget; of equals the cheapest.

    Returns the row, or None, and why. A budget needs prices.
    """
    if not rows:
        return None, "no scale was evaluated"
    if budget is not None and any(row["cost"] is None for row in rows):
        return None, "a budget needs a price per device-hour"
    limits = []
    if deadline_seconds is not None:
        limits.append(f"{deadline_seconds:g} s of training")
    if budget is not None:
        limits.append(f"a cost of {budget:g}")
    within = f" within {' and '.join(limits)}" if limits else ""
    fits = [
        row
        for row in rows
        if (deadline_seconds is None or row["train_seconds"] <= deadline_seconds)
        and (budget is None or row["cost"] <= budget)
    ]
    if not fits:
        return None, f"no scale that was run is{within}"
    best = min(fits, key=lambda row: (-row["validation_score"], row["device_hours"], row["train_seconds"]))
    return best, f"{best['scale']} is the best by validation{within}, and the cheapest of its equals"


COLUMNS = (
    "scale", "workers", "epochs", "validation", "test", "95 % interval", "n", "train s", "samples/s", "speed-up",
    "efficiency", "weights",
)  # fmt: skip


def _optional(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


def scaling_cells(row: Mapping[str, Any]) -> list[str]:
    """A row's cells in the order of `COLUMNS`, as text."""
    return [
        row["scale"],
        str(row["workers"]),
        str(row["epochs"]),
        f"{row['validation']:.4f}",
        f"{row['value']:.4f}",
        f"{row['low']:.4f}–{row['high']:.4f}",
        f"{row['n']:,}",
        f"{row['train_seconds']:.1f}",
        f"{row['samples_per_second']:,.0f}",
        _optional(row["speed_up"]),
        _optional(row["efficiency"]),
        row["weights_digest"][:10],
    ]


def scaling_table(rows: Sequence[Mapping[str, Any]], metric: str) -> Table:
    """The summary table over scales."""
    return Table(f"Scaling ({metric})", COLUMNS, [scaling_cells(row) for row in rows])


def cost_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What each scale used."""
    columns = ("scale", "device-hours", "cost", "CPU utilisation", "GPU utilisation")
    columns += ("peak memory MiB", "peak GPU memory MiB", "Pareto")

    def mebibytes(value: float | None) -> str:
        return _optional(value / 2**20 if value else None, ",.0f")

    cells = [
        [
            row["scale"],
            f"{row['device_hours']:.4g}",
            _optional(row["cost"], ".4g"),
            _optional(row["cpu_utilisation"], ".0%"),
            _optional(row["gpu_utilisation"], ".0%"),
            mebibytes(row["peak_memory_bytes"]),
            mebibytes(row["peak_gpu_memory_bytes"]),
            "yes" if row["pareto"] else "",
        ]
        for row in rows
    ]
    return Table("Cost", columns, cells)


def forecast_table(law: Law) -> Table:
    """What a law says of scales that were not run."""
    columns = ("not run", "workers", "samples/s", "95 % interval", "train s", "device-hours", "cost")
    cells = [
        [
            row["scale"],
            str(row["workers"]),
            f"{row['samples_per_second']:,.0f}",
            f"{row['low']:,.0f}–{row['high']:,.0f}",
            f"{row['train_seconds']:.1f}",
            f"{row['device_hours']:.4g}",
            _optional(row["cost"], ".4g"),
        ]
        for row in law.forecasts
    ]
    return Table("Forecast", columns, cells)
