"""Benchmarks in one: the parts that are named, in turns with those of an older commit, into one JSON and one table.

Run as `make bench PARTS="vision reduction" AGAINST=<commit>`, or `python -m mlpipes_tests.benchmarks --help`. Both sides are
measured by the benchmarks of this checkout, so a figure means the same on both; what the older code cannot do yet is said.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from mlpipes_tests.benchmarks.figures import FILE_VARIABLE
from mlpipes_tests.sandbox import CHECKOUT

NOW = "now"


@dataclass(frozen=True)
class Part:
    """One benchmark: its module in here, its arguments, and about how many minutes it takes on two cores."""

    module: str
    arguments: tuple[str, ...]
    minutes: float


PARTS = {
    "checkpoints": Part("checkpoints", (), 5),
    "reduction": Part("reduction", ("1", "2", "4"), 4),
    "vision": Part("vision", (), 4),
    "text": Part("text", (), 8),
    "sst2": Part("text_accuracy", ("0,1,2,3,4",), 5),
    "tax": Part("tax", (), 14),
    "peers": Part("peers", (), 6),
    "serving": Part("serving", ("4",), 2),
    "backfill": Part("backfill", ("10", "50"), 9),
    "start": Part("start", (), 7),
    "demo": Part("demo", (), 2),
    "growth": Part("growth", (), 4),
    "ettr": Part("ettr", ("60x20",), 22),
    "ettr-rare": Part("ettr", ("300x6",), 36),
}


@dataclass(frozen=True)
class Summary:
    """A figure on one side: the median of its values and a 95 % interval of it."""

    part: str
    name: str
    unit: str
    side: str
    values: list[float]
    low: float
    high: float

    @property
    def median(self) -> float:
        """The median of the values."""
        return float(np.median(self.values))


def summary(part: str, name: str, unit: str, side: str, values: Sequence[float]) -> Summary:
    """The median's interval is by bootstrap (percentiles of 2,000 resamples, Efron 1979); one value has no width."""
    from scipy import stats

    low = high = float(np.median(values))
    if len(set(values)) > 1:
        found = stats.bootstrap((values,), np.median, n_resamples=2000, method="percentile", rng=0)
        low, high = (float(bound) for bound in found.confidence_interval)
    return Summary(part, name, unit, side, list(values), low, high)


def ratio(now: Summary, before: Summary) -> tuple[float, float, float]:
    """Median of now ÷ median of before, with a 95 % interval by bootstrap of both."""
    random = np.random.default_rng(0)

    def medians(values: list[float]) -> np.ndarray:
        return np.median(random.choice(values, (2000, len(values))), axis=1)

    low, high = np.percentile(medians(now.values) / medians(before.values), (2.5, 97.5))
    return now.median / before.median, float(low), float(high)


@contextmanager
def _older(commit: str) -> Iterator[Path]:
    """A folder with the code of a commit and the benchmarks of this checkout."""
    with tempfile.TemporaryDirectory(prefix="mlpipes-bench-") as folder:
        tree, side = Path(folder) / "tree", Path(folder) / "side"
        git = ("git", "-C", str(CHECKOUT), "worktree")
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            side.mkdir()
            for name in ("Makefile", "pyproject.toml", "constraints.txt", "dagster.yaml", "workspace.yaml", "mlpipes"):
                if (tree / name).exists():
                    (side / name).symlink_to(tree / name)
            for name in ("mlpipes_tests", ".venv"):
                (side / name).symlink_to(CHECKOUT / name)
            yield side
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def _measured(part: Part, where: Path) -> tuple[list[dict[str, Any]], str]:
    """The figures of one run of a part in a folder, and why there are none."""
    with tempfile.TemporaryDirectory(prefix="mlpipes-bench-") as folder:
        path = Path(folder) / "figures.jsonl"
        done = subprocess.run(
            [sys.executable, "-m", f"mlpipes_tests.benchmarks.{part.module}", *part.arguments],
            cwd=where,
            env=os.environ | {FILE_VARIABLE: str(path), "PYTHONPATH": str(where)},
            capture_output=True,
            text=True,
        )
        typer.echo(done.stdout)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    reason = (done.stderr.strip().splitlines() or ["it measured nothing"])[-1] if done.returncode or not lines else ""
    return [json.loads(line) for line in lines], reason


def _machine() -> dict[str, Any]:
    import torch

    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return {
        "cpu": (model or ["unknown"])[0],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "torch": str(torch.__version__),
    }


def table(summaries: Sequence[Summary], before: str | None) -> str:
    """The figures in Markdown; with an older commit, also the ratio now ÷ then."""
    lines = ["| part | figure | unit | n | now, median (95 % interval) |", "| --- | --- | --- | --- | --- |"]
    if before:
        lines = [f"{lines[0]} {before[:10]} | now ÷ {before[:10]} |", f"{lines[1]} --- | --- |"]
    by_side = {(s.part, s.name, s.side): s for s in summaries}
    for s in summaries:
        if s.side != NOW:
            continue
        line = f"| {s.part} | {s.name} | {s.unit} | {len(s.values)} | {s.median:.4g} ({s.low:.4g}–{s.high:.4g}) |"
        if before:
            then = by_side.get((s.part, s.name, before))
            line += (
                " {:.4g} ({:.4g}–{:.4g}) | {:.2f} ({:.2f}–{:.2f}) |".format(
                    then.median, then.low, then.high, *ratio(s, then)
                )
                if then
                else " – | – |"
            )
        lines.append(line)
    return "\n".join(lines)


def main(
    parts: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(PARTS)}; default: all")] = None,
    against: Annotated[str | None, typer.Option(help="an older commit, measured in turns")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="times that each part runs on each side")] = 1,
    output: Annotated[Path, typer.Option(help="where the JSON goes")] = Path("benchmarks.json"),
) -> None:
    """Run benchmarks; print a table, and write all values to a JSON file."""
    names = parts or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise typer.BadParameter(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    before = None
    if against is not None:
        found = subprocess.run(
            ["git", "-C", str(CHECKOUT), "rev-parse", "--verify", "--quiet", f"{against}^{{commit}}"],
            capture_output=True,
            text=True,
        )
        if found.returncode:
            raise typer.BadParameter(f"{against!r} is no commit of this checkout")
        before = found.stdout.strip()
    typer.echo(f"About {sum(PARTS[name].minutes for name in names) * rounds * (2 if before else 1):.0f} minutes.")
    values: dict[tuple[str, str, str, str], list[float]] = {}
    missing, load, begun = dict[str, str](), os.getloadavg(), time.time()
    with _older(before) if before else nullcontext() as older:
        sides = {NOW: CHECKOUT} | ({before: older} if before and older else {})
        for number in range(rounds):
            for name in names:
                for side in list(sides)[:: 1 if number % 2 == 0 else -1]:
                    typer.echo(f"== {name}, {side[:10]}, round {number + 1} of {rounds}")
                    figures, reason = _measured(PARTS[name], sides[side])
                    if reason:
                        missing[f"{name}, {side[:10]}"] = reason
                    for figure in figures:
                        key = (name, figure["name"], figure["unit"], side)
                        values.setdefault(key, []).extend(figure["values"])
    summaries = [summary(*key, found) for key, found in values.items()]
    result = {
        "commit": subprocess.check_output(["git", "-C", str(CHECKOUT), "rev-parse", "HEAD"], text=True).strip(),
        "against": before,
        "machine": _machine(),
        "load_before_and_after": [load, os.getloadavg()],
        "begun": begun,
        "seconds": time.time() - begun,
        "missing": missing,
        "figures": [vars(s) | {"n": len(s.values), "median": s.median} for s in summaries],
    }
    output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    typer.echo(table(summaries, before))
    for what, reason in missing.items():
        typer.echo(f"{what}: not measured: {reason}")
    typer.echo(f"All values are in {output}.")
    if not summaries:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
