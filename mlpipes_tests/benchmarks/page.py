"""The page of benchmarks: `docs/benchmarks.md` and its pictures, made from what `make bench` wrote and nothing else.

`make bench-page` takes the parts of `benchmarks.json` over into `docs/benchmarks.json`, which keeps the newest run of each
part, and writes the page from that; a test holds the page to the file.
"""

import ast
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from mlpipes.reporting.figures import COLOURS, new_figure, png_of
from mlpipes_tests.benchmarks.__main__ import NOW, PARTS, Summary, table
from mlpipes_tests.sandbox import CHECKOUT

DOCS = CHECKOUT / "docs"
Run = dict[str, Any]
_SIZED = re.compile(r"(.+), (\d+)")
"""Name of a figure of a growth curve: what grows, and its size."""
_HEAD = """# Benchmarks

Made from [benchmarks.json](benchmarks.json), which has every value, by `make bench-page`; change nothing here by hand.
[Measured](measured.md) tells what was measured by hand, and what it means. Machines are shared, so figures of CPU-seconds
are steadier than those of seconds, and ratios to an older commit, measured in turns, are steadier than both. *n* counts the
values; the interval is of their median (bootstrap), and one value has no width.
"""


def merged(kept: Sequence[Run], new: Sequence[Run]) -> list[Run]:
    """Runs of which each has only the parts that no later one has."""
    taken, found = set[str](), []
    for run in sorted([*kept, *new], key=lambda run: -run["begun"]):
        figures = [figure for figure in run["figures"] if figure["part"] not in taken]
        if figures:
            found.append(run | {"figures": figures})
        taken |= {figure["part"] for figure in figures}
    return found


def _by_part(runs: Sequence[Run]) -> dict[str, tuple[Run, list[Summary]]]:
    found: dict[str, tuple[Run, list[Summary]]] = {}
    for run in runs:
        for figure in run["figures"]:
            fields = {name: figure[name] for name in ("part", "name", "unit", "side", "values", "low", "high")}
            found.setdefault(figure["part"], (run, []))[1].append(Summary(**fields))
    return {part: found[part] for part in PARTS if part in found}


def page(runs: Sequence[Run]) -> str:
    """The page in Markdown."""
    lines = [_HEAD]
    for part, (run, summaries) in _by_part(runs).items():
        module = CHECKOUT / "mlpipes_tests" / "benchmarks" / f"{PARTS[part].module}.py"
        said = (ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").splitlines()[0]
        machine, load = run["machine"], [place[0] for place in run["load_before_and_after"]]
        lines += [
            f"## {part}\n",
            f"{said} By `make bench PARTS={part}`"
            + (f" with `AGAINST={run['against'][:10]}`" if run["against"] else "")
            + f" at {run['commit'][:10]} on {time.strftime('%Y-%m-%d', time.gmtime(run['begun']))}; {machine['cpu']} "
            f"({machine['capability']}), {machine['cores']} cores, {machine['memory_gib']} GiB, torch {machine['torch']}; "
            f"load {load[0]:.1f} before and {load[1]:.1f} after.\n",
            f"![{part}](images/{picture_of(part)})\n",
            table(summaries, run["against"]),
            "",
        ]
        lines += [f"Not measured: {what}: {why}.\n" for what, why in run["missing"].items() if what.startswith(part)]
    return "\n".join(lines)


def picture_of(part: str) -> str:
    """The name of a part's picture."""
    return f"benchmarks-{part}.png"


def pictures(runs: Sequence[Run]) -> Iterator[tuple[str, bytes]]:
    """Name and PNG of each part's picture."""
    for part, (_, summaries) in _by_part(runs).items():
        curves = _curves(summaries)
        yield picture_of(part), _growth(curves) if curves else _intervals(summaries)


def _curves(summaries: Sequence[Summary]) -> Mapping[str, list[tuple[int, float]]]:
    """The sizes and CPU-seconds of a growth curve, by what grows; none for other figures."""
    found: dict[str, list[tuple[int, float]]] = {}
    for summary in summaries:
        if summary.unit == "CPU-seconds" and (match := _SIZED.fullmatch(summary.name)):
            found.setdefault(match[1], []).append((int(match[2]), summary.median))
    return found


def _growth(curves: Mapping[str, list[tuple[int, float]]]) -> bytes:
    figure, grid = new_figure(8, 4.5)
    (axes,) = np.ravel(grid)
    for number, (name, points) in enumerate(curves.items()):
        axes.plot(*zip(*sorted(points), strict=True), marker="o", color=COLOURS[number % len(COLOURS)], label=name)
    sizes = [size for points in curves.values() for size, _ in points]
    least = min(seconds for points in curves.values() for _, seconds in points)
    line = [(size, least * size / min(sizes)) for size in (min(sizes), max(sizes))]
    axes.plot(*zip(*line, strict=True), color="grey", linestyle="--", linewidth=1, label="linear")
    axes.set(xscale="log", yscale="log", xlabel="how many", ylabel="CPU-seconds")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return png_of(figure)


def _intervals(summaries: Sequence[Summary]) -> bytes:
    """Medians and intervals, a row a figure and a field a unit; the older commit hollow."""
    units = list(dict.fromkeys(summary.unit for summary in summaries))
    most = max(len({s.name for s in summaries if s.unit == unit}) for unit in units)
    figure, grid = new_figure(10, sum(1.2 + 0.3 * most for _ in units), rows=len(units))
    for axes, unit in zip(np.ravel(grid), units, strict=True):
        chosen = [summary for summary in summaries if summary.unit == unit]
        names = list(dict.fromkeys(summary.name for summary in chosen))
        for s in chosen:
            now = s.side == NOW
            error = [[s.median - s.low], [s.high - s.median]]
            place = names.index(s.name) + (0 if now else 0.25)
            axes.errorbar(
                [s.median],
                [place],
                xerr=error,
                fmt="o",
                capsize=3,
                color=COLOURS[0 if now else 1],
                mfc=None if now else "w",
            )
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set(title=unit, xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    return png_of(figure)


def main(
    found: Annotated[list[Path], typer.Argument(help="what `make bench` wrote")],
    docs: Annotated[Path, typer.Option(help="where the page lies")] = DOCS,
) -> None:
    """Take runs over, and write the page and its pictures."""
    path = docs / "benchmarks.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    runs = merged(kept, [json.loads(new.read_text(encoding="utf-8")) for new in found])
    path.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    (docs / "benchmarks.md").write_text(page(runs), encoding="utf-8")
    for name, png in pictures(runs):
        (docs / "images" / name).write_bytes(png)
        typer.echo(f"{docs / 'images' / name}")


if __name__ == "__main__":
    typer.run(main)
