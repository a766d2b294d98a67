"""The figure of the scaling report: scales side by side, throughput with its law, quality against cost."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlpipes.reporting.figures import COLOURS, new_figure, png_of

_TITLE_WIDTH = 36
"""Characters that a third of the figure has room for."""


def scaling(rows: Sequence[Mapping[str, Any]], laws: Sequence[Any], metric: str) -> bytes:
    """The scales side by side, and below them throughput with its law and forecasts, and quality against cost.

    Each row is one of `scaling_rows`; each of `laws` is a `Law`. Forecasts are hollow and dashed.
    """
    figure, grid = new_figure(12, 4.4 + 0.35 * len(rows), rows=2, columns=3)
    scores, seconds, efficiencies, throughput, front, memory = grid.reshape(-1)
    names, places = [row["scale"] for row in rows], np.arange(len(rows))
    values = np.array([row["value"] for row in rows])
    errors = np.abs(np.array([[row["low"], row["high"]] for row in rows]).T - values)
    scores.errorbar(values, places, xerr=errors, fmt="o", color=COLOURS[0], capsize=3)
    scores.set(title=f"test {metric}, 95 % interval")
    _bars(seconds, [row["train_seconds"] for row in rows], "training seconds (no start-up)", COLOURS[1])
    _bars(efficiencies, [row["efficiency"] or 0 for row in rows], "parallel efficiency", COLOURS[2])
    efficiencies.axvline(1, color="grey", linestyle="--", linewidth=1)
    _bars(memory, [(row["peak_memory_bytes"] or 0) / 2**20 for row in rows], "peak memory of a worker, MiB", COLOURS[4])
    for axes in (scores, seconds, efficiencies, memory):
        axes.set_yticks(places, names if axes in (scores, memory) else [])
        axes.set_ylim(len(rows) - 0.5, -0.5)
    _throughput(throughput, rows, [law for law in laws if law.says_something()])
    _front(front, rows, metric)
    for axes in grid.reshape(-1):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(textwrap.fill(axes.get_title(), _TITLE_WIDTH))  # a metric's name may be long
    return png_of(figure)


def _bars(axes: Any, values: Sequence[float], title: str, colour: str) -> None:
    axes.barh(np.arange(len(values)), values, color=colour, height=0.6)
    axes.set(title=title)


def _throughput(axes: Any, rows: Sequence[Mapping[str, Any]], laws: Sequence[Any]) -> None:
    axes.scatter(
        [row["workers"] for row in rows],
        [row["samples_per_second"] for row in rows],
        color=COLOURS[0],
        zorder=3,
        label="measured",
    )
    for law in laws:
        measured = [row["workers"] for row in rows if row["scale"] in law.scales]
        greatest = max([*measured, *(row["workers"] for row in law.forecasts)])
        counts = np.linspace(1, greatest, 60)
        curve = [law.law.forecast(count) for count in counts]
        axes.plot(counts, [point.value for point in curve], color="grey", linestyle="--", label=law.law.name)
        axes.fill_between(
            counts,
            [point.low for point in curve],
            [point.high for point in curve],
            color="grey",
            alpha=0.15,
            linewidth=0,
        )
        for row in law.forecasts:
            axes.scatter(
                row["workers"], row["samples_per_second"], facecolors="none", edgecolors="grey", label="forecast"
            )
    axes.xaxis.get_major_locator().set_params(integer=True)
    # One entry a kind, however many points it has.
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(entries.values(), entries.keys(), frameon=False, fontsize=8)
    # A band that says "anything" must not make the measurements invisible.
    tallest = max(row["samples_per_second"] for row in [*rows, *(row for law in laws for row in law.forecasts)])
    axes.set(xlabel="workers", title="samples/s, 95 % band" if laws else "samples/s", ylim=(0, 2 * tallest))


def _front(axes: Any, rows: Sequence[Mapping[str, Any]], metric: str) -> None:
    for number, row in enumerate(rows):
        marker, colour = ("o", COLOURS[1]) if row["pareto"] else ("x", "grey")
        axes.scatter(row["device_hours"], row["value"], marker=marker, color=colour)
        axes.annotate(
            row["scale"],
            (row["device_hours"], row["value"]),
            fontsize=7,
            xytext=(0, 8 + 10 * (number % 3)),
            textcoords="offset points",
            ha="center",
        )
    axes.set(xlabel="device-hours", title=f"test {metric}, o: on the Pareto front")
    axes.margins(0.35)
