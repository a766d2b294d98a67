"""Scaling: what more workers bought, from the outcomes and evaluations of a workload's scales."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlpipes.reporting.report import Table
from mlpipes.scales import RayScaleConfig


@dataclass(frozen=True)
class ScaleResult:
    """One scale's finished training and its evaluation."""

    scale: RayScaleConfig
    snapshot: str
    code: str
    validation: float
    test: Mapping[str, Any]
    """An `Estimate` as JSON."""
    train_seconds: float
    samples_per_second: float
    weights_digest: str
    comparable: str
    """What must be equal for two trainings to be the same work: all of the recipe but the workers."""


def scaling_rows(results: Sequence[ScaleResult]) -> list[dict[str, Any]]:
    """One row a scale: figures, and speed-up and efficiency against the fewest workers that did the same work.

    Speed-up is the ratio of samples per second; efficiency is speed-up over the ratio of workers. Both are None where no
    other scale did the same work (same data, batch size, epochs, hyperparameters, seed and code).
    """
    rows = []
    for result in results:
        same = [other for other in results if other.comparable == result.comparable]
        baseline = min(same, key=lambda other: other.scale.workers)
        alone = len(same) == 1
        speed_up = result.samples_per_second / baseline.samples_per_second
        rows.append(
            {
                "scale": result.scale.key,
                "workers": result.scale.workers,
                "epochs": result.scale.epochs,
                "validation": result.validation,
                **{key: result.test[key] for key in ("value", "low", "high", "n")},
                "train_seconds": result.train_seconds,
                "samples_per_second": result.samples_per_second,
                "baseline": None if alone else baseline.scale.key,
                "speed_up": None if alone else speed_up,
                "efficiency": None if alone else speed_up * baseline.scale.workers / result.scale.workers,
                "weights_digest": result.weights_digest,
                "snapshot": result.snapshot,
                "code": result.code,
            }
        )
    return rows


COLUMNS = (
    "scale", "workers", "epochs", "validation", "test", "95 % interval", "n", "train s", "samples/s", "speed-up",
    "efficiency", "weights",
)  # fmt: skip


def scaling_cells(row: Mapping[str, Any]) -> list[str]:
    """A row's cells in the order of `COLUMNS`, as text."""

    def optional(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

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
        optional(row["speed_up"]),
        optional(row["efficiency"]),
        row["weights_digest"][:10],
    ]


def scaling_table(rows: Sequence[Mapping[str, Any]], metric: str) -> Table:
    """The summary table over scales."""
    return Table(f"Scaling ({metric})", COLUMNS, [scaling_cells(row) for row in rows])


def as_json(results: Sequence[ScaleResult]) -> list[dict[str, Any]]:
    """The results as JSON."""
    return [asdict(result) | {"scale": result.scale.key} for result in results]
