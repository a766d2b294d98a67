"""The experiment desk in a browser: materialize, watch it live, backfill, cancel, gates, and a night; screenshots kept."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlpipes_tests.browser import OUTPUT, browser_page
from mlpipes_tests.sandbox import Sandbox, end, free_port, graphql, wait_for

LONG, SHORT = "w1-b64-e140-g0", ["w1-b128-e4-g0", "w2-b128-e4-g0", "w1-b64-e4-g0"]
FIRST = SHORT[0]
ALL = [*SHORT, LONG]  # the dialog shows four at most by name
JOB = "locations/mlpipes.definitions/jobs/digits_chain"
_LAUNCHED = """{ runsOrError { ... on Runs { results { jobName } } }
  partitionBackfillsOrError { ... on PartitionBackfills { results { id } } } }"""
_FAILURES = """query($run: ID!) { logsForRun(runId: $run) { ... on EventConnection { events {
  ... on ExecutionStepFailureEvent { error { message } } } } } }"""
_RUNS = """{ runsOrError { ... on Runs { results { runId status jobName tags { key value } } } } }"""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A running `mlpipes dev` with some small scales of digits, and a night every minute."""
    sandbox = Sandbox(tmp_path_factory.mktemp("desk"))
    scales = "\n".join(f"  - {key}" for key in ALL)
    (sandbox.path / "scales.yaml").write_text(f"digits:\n{scales}\n")
    sandbox.environment |= {
        "MLPIPES_SCALES": str(sandbox.path / "scales.yaml"),
        "MLPIPES_NIGHTLY": "* * * * *",
        "MLPIPES_DAGSTER_UI": f"http://127.0.0.1:{free_port()}",
    }
    sandbox.address = sandbox.environment["MLPIPES_DAGSTER_UI"]  # type: ignore[attr-defined]
    port, mlflow = sandbox.environment["MLPIPES_DAGSTER_UI"].rpartition(":")[2], str(free_port())
    dev = sandbox.start(".venv/bin/mlpipes", "dev", "--port", port, "--mlflow", "--mlflow-port", mlflow)
    try:
        wait_for(f"{sandbox.environment['MLPIPES_DAGSTER_UI']}/server_info")
        yield sandbox
    finally:
        end(dev)
        sandbox.run(".venv/bin/mlpipes ray down")


@pytest.fixture(scope="module")
def page(desk: Sandbox) -> Iterator[Any]:
    with browser_page(1150) as opened:
        opened.set_default_timeout(60_000)
        yield opened


def go(page: Any, desk: Sandbox, path: str) -> None:
    page.goto(f"{desk.address}/{path}")  # type: ignore[attr-defined]


def picture(page: Any, name: str) -> None:
    page.wait_for_timeout(1500)
    page.screenshot(path=OUTPUT / f"{name}.png")


def materialize(page: Any, desk: Sandbox, scales: list[str]) -> None:
    """Launch the chain for some scales, as a user does."""
    chips = {key: page.locator(f"[data-tooltip='{key}']") for key in ALL}

    def all_are_chosen() -> bool:
        go(page, desk, JOB)
        page.get_by_role("button", name="Materialize all").first.click()
        page.get_by_role("button", name="All", exact=True).click()  # by default those that are missing are chosen
        page.get_by_role("button", name="Custom").click()
        page.wait_for_timeout(2000)  # what is missing may come to be known late, and be chosen then
        return all(chip.last.get_by_role("img", name="close").count() for chip in chips.values())

    until(all_are_chosen, "the dialog offers each scale")
    for key in set(chips) - set(scales):
        chips[key].last.get_by_role("img", name="close").click()
    launch = page.get_by_role("button", name=re.compile("^Launch (1 run|backfill)"))
    before = launched(desk)
    launch.click()
    until(lambda: launched(desk) > before, "the launch is known", 60)  # who leaves the page sooner takes it back


def launched(desk: Sandbox) -> int:
    """How many runs of the chain and backfills there are."""
    found = graphql(desk.address, _LAUNCHED)  # type: ignore[attr-defined]
    chains = [run for run in found["runsOrError"]["results"] if run["jobName"] == "digits_chain"]
    return len(chains) + len(found["partitionBackfillsOrError"]["results"])


def runs(desk: Sandbox, scale: str, job: str | None = None) -> list[str]:
    """The statuses of a scale's runs, the latest first."""
    found = graphql(desk.address, _RUNS)["runsOrError"]["results"]  # type: ignore[attr-defined]
    return [
        run["status"]
        for run in found
        if {"key": "dagster/partition", "value": scale} in run["tags"] and (job is None or run["jobName"] == job)
    ]


def until(condition: Any, what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:.0f} s it is not so that {what}"
        time.sleep(1)


def test_a_partition_is_materialized_and_its_checks_are_seen(page: Any, desk: Sandbox) -> None:
    materialize(page, desk, [FIRST])
    until(lambda: runs(desk, FIRST) == ["SUCCESS"], "the first scale is materialized")
    go(page, desk, "assets/digits/eval_report?view=checks")
    for name in ("floor", "regression", "calibration", "drift"):
        page.get_by_text(name, exact=True).first.wait_for()
    page.get_by_text("floor", exact=True).first.click()
    page.get_by_text("This is a blocking asset check").wait_for()
    page.get_by_text("Passed").first.wait_for()
    picture(page, "checks")


def test_the_live_view_changes_while_it_trains_and_a_cancelled_run_ends(page: Any, desk: Sandbox) -> None:
    materialize(page, desk, [LONG])
    go(page, desk, "assets/digits/live")
    step = re.compile(r"^\d+/\d+$")

    def shown() -> str:
        page.reload()  # Dagster shows new observations of an asset when asked to
        page.get_by_text("Last 7 days").wait_for()
        page.wait_for_timeout(1000)
        cells = page.locator("td", has_text=step).all_inner_texts()
        return cells[0] if cells else ""

    figures = ("loss", "validation_accuracy", "samples_per_second", "eta_seconds", "latest_checkpoint", "mlflow")
    until(
        lambda: shown() and all(page.get_by_text(f"{name} · {LONG}").count() for name in figures),
        "the live view shows the training",
    )
    before = shown()
    until(lambda: shown() not in ("", before), "the live view has changed", 60)
    page.get_by_role("button", name="Plots").click()
    picture(page, "live")

    found = graphql(desk.address, _RUNS)["runsOrError"]["results"]  # type: ignore[attr-defined]
    mine = next(run for run in found if {"key": "dagster/partition", "value": LONG} in run["tags"])
    go(page, desk, f"runs/{mine['runId']}")
    page.get_by_role("button", name=re.compile("Terminate")).first.click()
    page.get_by_role("button", name=re.compile("Terminate")).last.click()
    until(lambda: runs(desk, LONG)[0] == "CANCELED", "the run is cancelled", 60)
    picture(page, "cancelled")


def test_a_backfill_over_three_scales_and_the_report_that_follows(page: Any, desk: Sandbox) -> None:
    materialize(page, desk, SHORT)
    until(
        lambda: all(runs(desk, key) and runs(desk, key)[0] == "SUCCESS" for key in SHORT), "all three are materialized"
    )
    # Nobody asks for the report: it follows when nothing is in progress any more.
    report = desk.home / "store" / "reports" / "digits" / "scaling_report.md"

    def has_followed() -> bool:
        text = report.read_text() if report.is_file() else ""
        return f"Not evaluated: {LONG} (training " in text and text.count("Not evaluated: ") == 1

    until(has_followed, "the report has followed")

    def is_shown() -> bool:
        """Whether Dagster has the event by now (the file is there before), and shows that report, not the one before."""
        go(page, desk, "assets/digits/scaling_report")
        page.wait_for_timeout(3000)
        recommended, missing = (page.get_by_text(text).count() for text in ("recommended", "never trained"))
        return recommended > 0 and missing == 0

    until(is_shown, "the page shows the report of all three")
    page.get_by_text("[Show Markdown]").first.wait_for()
    picture(page, "report")

    done = desk.run(".venv/bin/mlpipes backfill digits " + " ".join(f"--scale {key}" for key in SHORT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Fresh, nothing to do: " + ", ".join(SHORT) in done.stdout


def test_a_backfill_from_the_command_line_goes_on_where_the_cancelled_run_stopped(desk: Sandbox) -> None:
    (path,) = [p for p in (desk.home / "store").glob("trainings/*/") if not (p / "result.json").is_file()]
    done = desk.run(f".venv/bin/mlpipes backfill digits --scale {LONG} --smallest-first")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{LONG}: SUCCESS" in done.stdout
    assert (path / "result.json").is_file()
    assert '"resumed_from_step": 0' not in (path / "result.json").read_text()


def test_a_backfill_that_fails_says_so_and_where_to_look(desk: Sandbox) -> None:
    key = "w1-b256-e12-g0"
    done = desk.run(f".venv/bin/mlpipes backfill cifar10 --scale {key}", timeout=150)  # whose data are not there
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{key}: FAILURE")]
    address, _, run = line.rpartition(" ")[2].rpartition("/runs/")
    found = graphql(address, _FAILURES, run=run)["logsForRun"]["events"]
    assert any("mlpipes fetch cifar10" in event["error"]["message"] for event in found if event.get("error"))


def test_the_schedule_is_switched_on_and_its_tick_judges_each_scale_once(page: Any, desk: Sandbox) -> None:
    go(page, desk, "locations/mlpipes.definitions/schedules/digits_nightly")
    switch = page.locator("input[type=checkbox]").first
    switch.wait_for(state="attached")
    for wanted in (False, True):
        if switch.is_checked() != wanted:
            switch.locator("xpath=..").click()
            until(lambda wanted=wanted: switch.is_checked() == wanted, "the switch has moved", 30)
    until(lambda: all(runs(desk, key, "digits_evaluation") for key in SHORT), "a tick has judged each scale", 150)
    until(lambda: all(runs(desk, key, "digits_evaluation") == ["SUCCESS"] for key in SHORT), "they have passed")
    page.reload()
    page.get_by_text("requested").first.wait_for()
    picture(page, "nights")
    history = desk.run(f".venv/bin/mlpipes history digits {FIRST}")
    assert history.stdout.count("passed") >= 2


def test_pictures_were_kept(desk: Sandbox) -> None:
    for name in ("checks", "live", "cancelled", "report", "nights"):
        path: Path = OUTPUT / f"{name}.png"
        assert path.stat().st_size > 20_000, name
