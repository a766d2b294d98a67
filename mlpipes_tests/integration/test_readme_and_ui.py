"""What the README says, done as a new user would: every command is run, every example is loaded, the UI is looked at."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlpipes.workloads.catalog import CATALOG
from mlpipes_tests.browser import OUTPUT, browser_page
from mlpipes_tests.conftest import missing
from mlpipes_tests.sandbox import CHECKOUT, Sandbox, end, free_port, graphql, wait_for

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
ELSEWHERE = {
    "make test": "this very test runs in it",
    "make dev": "the fixture `ui`",
    ".venv/bin/mlpipes backfill digits": "test_desk_ui.py, for a Dagster must run",
    ".venv/bin/mlpipes doctor slurm": "test_slurm.py, for a Slurm must run",
    ".venv/bin/mlpipes demo --workload digits --scale w1-b128-e30-g0": "the fixture `folder`, as part of make demo",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A folder in which `make demo` was run."""
    if not (CHECKOUT / ".venv" / ".installed").is_file():
        missing("`make install` was not run in this checkout, and a test must not install into it")
    made = Sandbox(tmp_path_factory.mktemp("checkout"))
    try:
        made.demo = made.run("make demo", timeout=800)  # type: ignore[attr-defined]
        yield made
    finally:
        made.run(".venv/bin/mlpipes ray down")


@pytest.fixture(scope="module")
def ui(folder: Sandbox) -> Iterator[str]:
    """The address of the Dagster UI that `make dev` serves there."""
    port, mlflow = free_port(), free_port()
    server = folder.start(
        *(".venv/bin/mlpipes", "dev", "--port", str(port), "--mlflow", "--mlflow-port", str(mlflow)), log="dev.log"
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/server_info")
        wait_for(f"http://127.0.0.1:{mlflow}/health")
        yield address
    finally:
        end(server)


def test_make_demo_prints_the_table_and_stops_what_it_started(folder: Sandbox) -> None:
    demo = folder.demo  # type: ignore[attr-defined]
    assert demo.returncode == 0, demo.stdout + demo.stderr
    for text in ("w1-b128-e30-g0", "w2-b128-e30-g0", "w4-b128-e30-g0-c0.5", "95 % interval", "speed-up", "Pictures:"):
        assert text in demo.stdout
    assert "the same model, bit for bit" in demo.stdout
    rows = re.findall(r"│ w\d-b128\S* +│.*│", demo.stdout)
    assert len(rows) == 3
    for row in rows:
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert float(cells[4]) >= 0.99, "test accuracy of digits"
    seconds = re.search(r"Done in (\d+) s", demo.stdout)
    assert seconds is not None
    assert "No local Ray runs" in folder.run(".venv/bin/mlpipes ray status").stdout


def test_every_command_of_the_readme_runs(folder: Sandbox) -> None:
    commands = [line for block in blocks("bash") for line in block.strip().splitlines()]
    assert len(commands) > 8
    expected = {
        "make demo": "Done in",  # the second time, everything is found again
        ".venv/bin/mlpipes scales": "w2-b128-e30-g0",
        ".venv/bin/mlpipes status": "finished",
        ".venv/bin/mlpipes checkpoints digits w1-b128-e30-g0": "good",
        ".venv/bin/mlpipes report digits": "scaling report",
        ".venv/bin/mlpipes report digits --deadline 60": "best by validation within 60 s",
        ".venv/bin/mlpipes history digits w1-b128-e30-g0": "passed",
        '.venv/bin/mlpipes promote digits w2-b128-e30-g0 --reason "as good, and twice as fast"': "is champion",
        '.venv/bin/mlpipes rollback digits --reason "changed my mind"': "is champion again",
        ".venv/bin/mlpipes compare digits/w1-b128-e30-g0 digits/w2-b128-e30-g0": "the same model, bit for bit",
        ".venv/bin/mlpipes replay digits w1-b128-e30-g0": "equal, bit for bit",
        ".venv/bin/mlpipes ray up": "Ray runs; dashboard http://127.0.0.1:",
        ".venv/bin/mlpipes ray status": "Ray runs (pid",
        ".venv/bin/mlpipes ray down": "Ray ended.",
    }
    for command in commands:
        if command in ELSEWHERE:
            continue
        result = folder.run(command)
        if command.endswith("fetch cifar10"):
            # Where there is no network, the error says what else to do; where there is, the data are there.
            assert result.returncode == 0 or "set MLPIPES_CIFAR10 to it" in result.stderr.replace("\n", " "), (
                result.stderr
            )
        else:
            assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
            assert expected[command] in result.stdout, command
    # What was trained was found by its fingerprint, and no new job was submitted.
    attempts = [len(list(path.glob("a*.jsonl"))) for path in folder.home.glob("store/trainings/*/messages")]
    assert attempts == [1, 1, 1]


def test_the_example_workload_of_the_readme_trains(
    folder: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlpipes.workloads.catalog import entry
    from mlpipes_tests.training.harness import make_job, run_here

    _, workload, line = blocks("python")
    (tmp_path / "readme_example.py").write_text(workload)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(workload.splitlines()) <= 60
    made = eval(line, {"entry": entry})  # noqa: S307 - our own README
    assert made.name == "shapes"
    implementation = made.implementation.replace("mlpipes.workloads.shapes", "readme_example")
    outcome = run_here(make_job(tmp_path / "store", made.scales[0].key, implementation))
    assert outcome["best"]["metrics"]["accuracy"] > 0.5


def test_the_text_example_of_the_readme_makes_a_workload() -> None:
    from mlpipes.data.splits import SplitPlan
    from mlpipes.data.tables import TableSource
    from mlpipes.errors import DataError
    from mlpipes.workloads.encoders import Pretrained
    from mlpipes.workloads.text_classification import TextClassification

    names = {c.__name__: c for c in (SplitPlan, TableSource, Pretrained, TextClassification)}
    exec(blocks("python")[0], names)  # noqa: S102 - our own README
    reviews: Any = names["reviews"]
    assert reviews.split.content == ("text",)
    with pytest.raises(DataError, match=r"there is no file reviews\.csv"):
        reviews.source.load()


def test_the_scale_file_of_the_readme_is_valid(folder: Sandbox, tmp_path: Path) -> None:
    example = next(block for block in blocks("yaml") if block.startswith("digits:"))
    assert isinstance(yaml.safe_load(example), dict)
    (tmp_path / "scales.yaml").write_text(example)
    result = folder.run(".venv/bin/mlpipes scales", MLPIPES_SCALES=str(tmp_path / "scales.yaml"))
    assert "w4-b256-e10-g0-c0.5" in result.stdout


def test_the_launchpad_configs_of_the_readme_are_valid() -> None:
    from mlpipes.assets.training import TrainingConfig, make_recipe

    examples = [yaml.safe_load(block)["ops"] for block in blocks("yaml") if block.startswith("ops:")]
    assert [name for example in examples for name in example] == ["cifar10__checkpoints", "sst2__checkpoints"]
    for example in examples:
        ((name, step),) = example.items()
        entry = next(e for e in CATALOG if name == f"{e.name}__checkpoints")
        config = TrainingConfig.model_validate(step["config"])
        recipe = make_recipe(entry, entry.scales[0].key, "s" * 64, config, "")
        assert recipe.hyperparameters.items() >= config.hyperparameters.items()


def test_an_unknown_workload_is_an_error_without_a_traceback(folder: Sandbox) -> None:
    result = folder.run(".venv/bin/mlpipes report nope")
    assert result.returncode == 1
    assert "unknown workload 'nope'; known are digits, cifar10" in result.stderr
    assert "Traceback" not in result.stderr


def test_plain_dagster_dev_keeps_the_history(folder: Sandbox) -> None:
    port = free_port()
    server = folder.start(".venv/bin/dagster", "dev", "-p", str(port), log="plain.log")
    try:
        wait_for(f"http://127.0.0.1:{port}/server_info")
        found = graphql(f"http://127.0.0.1:{port}", "{ runsOrError { ... on Runs { results { status jobName } } } }")
        chains = [run for run in found["runsOrError"]["results"] if run["jobName"] == "digits_chain"]
        assert len(chains) >= 3
        assert {run["status"] for run in chains} == {"SUCCESS"}
    finally:
        end(server)


def test_the_ui_shows_graph_partition_and_report(ui: str) -> None:
    with browser_page(1000) as page:
        page.goto(f"{ui}/locations/mlpipes.definitions/asset-groups/digits")
        for name in ("dataset", "snapshot", "checkpoints", "model", "eval_report", "scaling_report"):
            page.get_by_text(name, exact=True).first.wait_for(timeout=30_000)
        page.screenshot(path=OUTPUT / "graph.png")

        page.goto(f"{ui}/assets/digits/checkpoints?view=partitions&partition=w2-b128-e30-g0")
        page.get_by_text("weights_digest").wait_for(timeout=30_000)
        page.get_by_text("[Show Markdown]").first.click()
        picture = page.locator("img[alt='loss and validation curves']")
        picture.wait_for(timeout=30_000)
        assert picture.evaluate("image => image.naturalWidth") > 300
        page.screenshot(path=OUTPUT / "checkpoints.png")

        page.goto(f"{ui}/assets/digits/scaling_report")
        page.get_by_text("efficiency").first.wait_for(timeout=30_000)
        page.screenshot(path=OUTPUT / "scaling_report.png")
