"""The report of an evaluation: estimates with intervals, tables and figures, as JSON, Markdown and PNG."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mlpipes.store.estimate import Estimate


@dataclass(frozen=True)
class Table:
    """A titled table; cells are numbers or text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def markdown(self) -> str:
        """The table as GitHub Markdown."""
        return "\n".join(
            [
                "| " + " | ".join(map(escaped, self.columns)) + " |",
                "|" + " --- |" * len(self.columns),
                *("| " + " | ".join(escaped(cell) for cell in row) + " |" for row in self.rows),
            ]
        )


def escaped(cell: Any) -> str:
    """A cell's text for a Markdown table: floats with four decimals, pipes and line breaks made harmless."""
    text = "–" if cell is None else f"{cell:.4f}" if isinstance(cell, float) else str(cell)
    return text.replace("|", "\\|").replace("\n", " ")


@dataclass(frozen=True)
class Report:
    """What an evaluation found."""

    estimates: Mapping[str, Estimate]
    tables: Sequence[Table] = ()
    figures: Mapping[str, bytes] = field(default_factory=dict)
    """PNG files by name."""
    notes: Sequence[str] = ()
    quantities: Mapping[str, float] = field(default_factory=dict)
    """Figures without an interval. The gates know `baseline` (the primary metric of blind guessing) and
    `expected_calibration_error`."""

    def as_dict(self) -> dict[str, Any]:
        """All but the pictures, as JSON."""
        return {
            "estimates": {name: asdict(estimate) for name, estimate in self.estimates.items()},
            "tables": [asdict(table) for table in self.tables],
            "quantities": dict(self.quantities),
            "figures": sorted(self.figures),
            "notes": list(self.notes),
        }

    def markdown(self, title: str, measured_on: Mapping[str, Any]) -> str:
        """The report as Markdown; pictures are referred to as files beside it."""
        lines = [f"# {title}", "", "Measured on: " + ", ".join(f"{k} {v}" for k, v in measured_on.items()) + ".", ""]
        estimates = Table(
            "", ["metric", "value", "95 % low", "95 % high", "n"],
            [[name, e.value, e.low, e.high, e.n] for name, e in self.estimates.items()],
        )  # fmt: skip
        lines += [estimates.markdown(), ""]
        lines += [f"{note}\n" for note in self.notes]
        for table in self.tables:
            lines += [f"## {table.title}", "", table.markdown(), ""]
        for name in self.figures:
            lines += [f"![{name}]({name}.png)", ""]
        return "\n".join(lines)
