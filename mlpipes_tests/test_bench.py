"""The runner of benchmarks: both sides are measured by the same benchmark, and all values are kept."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mlpipes.store.messages import Progressed, Started
from mlpipes_tests.benchmarks import __main__ as bench
from mlpipes_tests.benchmarks import ettr, figures, page

TINY = """
from mlpipes.speed import speed
from mlpipes_tests.benchmarks.figures import record
record("speed", "units", [speed(), speed() + 1, speed() + 2])
"""
BROKEN = (
    "from mlpipes.new import thing\nfrom mlpipes_tests.benchmarks.figures import record\nrecord('new', 's', [thing])\n"
)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of two commits: the second is ten times as fast, and can do more."""
    folder = tmp_path / "checkout"

    def commit(files: dict[str, str]) -> None:
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        subprocess.run(["git", "add", "."], cwd=folder, check=True)
        identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, "commit", "-qm", "a commit"], cwd=folder, check=True)

    folder.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    commit({"mlpipes/__init__.py": "", "mlpipes/speed.py": "def speed(): return 1.0\n"})
    commit({"mlpipes/speed.py": "def speed(): return 10.0\n", "mlpipes/new.py": "thing = 1.0\n"})
    for name in ("tiny", "broken"):
        path = folder / "mlpipes_tests" / "benchmarks" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TINY if name == "tiny" else BROKEN)
    for package in (path.parent, path.parent.parent):
        (package / "__init__.py").write_text("")
    shutil.copy(figures.__file__, path.parent)
    (folder / ".venv").mkdir()
    monkeypatch.setattr(bench, "CHECKOUT", folder)
    monkeypatch.setattr(bench, "PARTS", {name: bench.Part(name, (), 0) for name in ("tiny", "broken")})
    return folder


def run(*arguments: str) -> tuple[int, str]:
    import typer

    app = typer.Typer()
    app.command()(bench.main)
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, done.output


def test_both_sides_are_measured_in_turns_and_all_values_are_kept(checkout: Path, tmp_path: Path) -> None:
    code, output = run("--against", "HEAD~1", "--rounds", "2", "--output", str(tmp_path / "found.json"))
    assert code == 0, output
    found = json.loads((tmp_path / "found.json").read_text())
    values = {(f["part"], f["side"] == bench.NOW): f["values"] for f in found["figures"]}
    assert values == {
        ("tiny", True): [10.0, 11.0, 12.0] * 2,
        ("tiny", False): [1.0, 2.0, 3.0] * 2,
        ("broken", True): [1.0] * 2,
    }
    assert "| tiny | speed | units | 6 | 11 (10–12) |" in output
    assert "| 5.50 (" in output
    assert "broken, " in output
    assert "No module named 'mlpipes.new'" in output
    heads = [line for line in output.splitlines() if line.startswith("== tiny")]
    assert ["now" in head for head in heads] == [True, False, False, True], "neither side always comes first"
    trees = subprocess.check_output(["git", "worktree", "list"], cwd=checkout, text=True)
    assert len(trees.splitlines()) == 1, "nothing is left of the older commit"


@pytest.mark.parametrize(
    ("arguments", "said"), [(("tinny",), "no part 'tinny'"), (("--against", "nowhere"), "'nowhere' is no commit")]
)
def test_mistakes_are_told_before_anything_runs(checkout: Path, arguments: tuple[str, ...], said: str) -> None:
    code, output = run(*arguments)
    assert code == 2
    assert said in output


def test_a_ratio_has_its_interval() -> None:
    slow, fast = (
        bench.summary("p", "n", "s", side, [base + i / 10 for i in range(11)])
        for side, base in (("old", 10.0), (bench.NOW, 5.0))
    )
    middle, low, high = bench.ratio(fast, slow)
    assert middle == pytest.approx(5.5 / 10.5)
    assert 5 / 11 <= low < middle < high <= 6 / 10
    assert slow.low < slow.median < slow.high


def run_of(part: str, begun: float, value: float, name: str = "a figure", unit: str = "s") -> dict[str, Any]:
    """What `make bench` writes about a part."""
    measured = [vars(bench.summary(part, name, unit, side, [value, value + 1])) for side in (bench.NOW, "0" * 40)]
    machine = {"cpu": "a CPU", "capability": "AVX2", "cores": 2, "memory_gib": 23.5, "torch": "2"}
    load = [[0.5, 0, 0], [1.5, 0, 0]]
    missing = {"text, now": "no data", "vision, now": "no data"}
    fields = {"commit": "1" * 40, "against": "0" * 40, "begun": begun, "missing": missing, "figures": measured}
    return fields | {"machine": machine, "load_before_and_after": load, "seconds": 1.0}


def test_a_page_has_the_newest_run_of_each_part(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number, made in enumerate(
        [
            [run_of("text", 100.0, 3.0), run_of("vision", 100.0, 4.0)],
            [run_of("text", 200.0, 5.0), run_of("growth", 200.0, 6.0, "trainings, 10", "CPU-seconds")],
            [run_of("vision", 50.0, 7.0)],
        ]
    ):
        files = [tmp_path / f"{number}-{place}.json" for place in range(len(made))]
        for path, content in zip(files, made, strict=True):
            path.write_text(json.dumps(content))
        page.main(files, docs=tmp_path)
    text = (tmp_path / "benchmarks.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## vision", "## text", "## growth"]
    assert "| text | a figure | s | 2 | 5.5 (5–6) | 5.5 (5–6) | 1.00 (" in text
    assert "| vision | a figure | s | 2 | 4.5 (4–5) |" in text, "an older run replaces nothing"
    assert "load 0.5 before and 1.5 after" in text
    assert text.count("Not measured: text, now: no data.") == 1
    for part in ("vision", "text", "growth"):
        assert (tmp_path / "images" / page.picture_of(part)).read_bytes().startswith(b"\x89PNG")
    kept = json.loads((tmp_path / "benchmarks.json").read_text())
    assert len(kept) == 3, "a run whose parts were measured again is gone"


def test_the_page_says_what_its_file_has() -> None:
    runs = json.loads((page.DOCS / "benchmarks.json").read_text())
    assert (page.DOCS / "benchmarks.md").read_text() == page.page(runs), "run make bench-page"
    assert all((page.DOCS / "images" / name).is_file() for name, _ in page.pictures(runs))


def test_effective_training_time_counts_a_step_once() -> None:
    """Steps of a second each, begun after ten; a fault at 100 s: 30 s of nothing, and 19 steps again."""

    def told(at: float, step: int) -> Progressed:
        return Progressed(
            time=at, step=step, total_steps=999, epoch=step / 50, loss=1.0, samples_per_second=64.0, eta_seconds=1.0
        )

    before = [told(10.0 + step, step) for step in range(1, 91)]
    again = Started(time=130.0, step=70, total_steps=999, precision="fp32", workers=2)
    after = [told(130.0 + n, 70 + n) for n in range(1, 71)]
    found = ettr.measured([*after, again, *before], launched=0.0, faults=[100.0], victims=["worker"], ended=200.0)
    assert found.ratio == pytest.approx(140 / 200)
    assert found.undisturbed == pytest.approx(1.0)
    assert found.downs == [30.0]
    assert found.lost == [pytest.approx(50.0)], "20 s repeated, 30 s of nothing"
    assert found.ratio_at(500.0) == pytest.approx(0.9)
    assert found.epoch_seconds == pytest.approx(50.0)
    # At the fault, 89 s of steps are done, of which an epoch of 50 s is kept; 70 s of steps follow.
    assert ettr.ratio_of_epochs(found, 50.0) == pytest.approx((50 + 70) / 200)
    assert ettr.ratio_of_epochs(found, 1000.0) == pytest.approx(70 / 200)
