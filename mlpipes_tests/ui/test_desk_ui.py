"""The experiment desk in a browser: materialize, watch it live, backfill, cancel, gates, and a night; screenshots kept."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from mlpipes_tests.browser import browser_page, leave, picture
from mlpipes_tests.desk import Desk
from mlpipes_tests.waiting import comes, until

pytestmark = pytest.mark.browser
LONG, SHORT = "w1-b64-e12-g0", ["w1-b128-e4-g0", "w2-b128-e4-g0", "w1-b64-e4-g0"]
FIRST = SHORT[0]
ALL = [*SHORT, LONG]  # the dialog shows four at most by name
EARLY, LATE = 0.4, 0.8
"""Where the long training waits; before the first, there were epochs."""
_STEP = re.compile(r"^\d+/\d+$")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """Some small scales of digits, and a night every minute."""
    made = Desk(tmp_path_factory.mktemp("desk"), {"digits": ALL}, held=True)
    made.environment["MLPIPES_NIGHTLY"] = "* * * * *"
    with made.served():
        yield made


@pytest.fixture(scope="module")
def page(desk: Desk) -> Iterator[Any]:
    with browser_page(1150) as opened:
        yield opened


# -- what a user does, in this order whatever the order of the tests --------------------------------------------------
@pytest.fixture(scope="module")
def materialized(page: Any, desk: Desk) -> None:
    """One scale, by clicks."""
    desk.materialize(page, "digits", [FIRST])
    desk.until_done([FIRST], "digits_chain")


@pytest.fixture(scope="module")
def watched(page: Any, desk: Desk, materialized: None) -> tuple[str, str]:
    """A long training is watched in the live view, which shows a step and a later one; then its run is cancelled."""
    desk.barriers.close(EARLY, LATE)
    desk.materialize(page, "digits", [LONG])
    desk.barriers.wait_for(EARLY)
    desk.go(page, "assets/digits/live")
    figures = ("loss", "validation_accuracy", "samples_per_second", "eta_seconds", "latest_checkpoint", "mlflow")

    def shown() -> str:
        """The step of the latest training, if all figures of it are there."""
        page.reload()  # Dagster shows new observations of an asset when asked to
        steps = page.locator("td", has_text=_STEP)
        there = comes(lambda: steps.count() and all(page.get_by_text(f"{name} · {LONG}").count() for name in figures))
        return steps.first.inner_text() if there else ""

    before = until(shown, "the live view shows the training", every=1)
    desk.barriers.open(EARLY)
    desk.barriers.wait_for(LATE)
    after = until(lambda: (now := shown()) not in ("", before) and now, "the live view has changed", every=1)
    page.get_by_role("button", name="Plots").click()
    picture(page, "live")

    terminate, sure = (page.get_by_role("button", name=re.compile(f"Terminate{which}$")) for which in ("", " 1 run"))
    desk.see(page, f"runs/{desk.run_of(LONG)}", sure, click=terminate)  # the name begins with that of its icon
    sure.click()
    asked = desk.home / "store" / "trainings"
    until(lambda: list(asked.glob("*/jobs/a1.stop")), "the training is asked for a last checkpoint")
    desk.barriers.open()
    until(lambda: desk.runs(LONG)[0] == "CANCELED", "the run is cancelled")
    picture(page, "cancelled")
    return before, str(after)


@pytest.fixture(scope="module")
def backfilled(page: Any, desk: Desk, watched: tuple[str, str]) -> None:
    """All short scales, by clicks; the report follows, which nobody asks for, when nothing is in progress any more."""
    desk.materialize(page, "digits", SHORT)
    desk.until_done(SHORT, "digits_chain")
    report = desk.home / "store" / "reports" / "digits" / "scaling_report.md"

    def has_followed() -> bool:
        text = report.read_text() if report.is_file() else ""
        return f"Not evaluated: {LONG} (training " in text and text.count("Not evaluated: ") == 1

    until(has_followed, "the report has followed", every=1)

    def is_shown() -> bool:
        """Whether Dagster has the event by now (the file is there before), and shows that report, not the one before."""
        desk.go(page, "assets/digits/scaling_report")
        return comes(lambda: page.get_by_text("recommended").count()) and not page.get_by_text("never trained").count()

    until(is_shown, "the page shows the report of all three", every=1)
    page.get_by_text("[Show Markdown]").first.wait_for()
    picture(page, "report")


# -- what then is so ---------------------------------------------------------------------------------------------------
def test_the_checks_of_a_materialized_partition_are_seen(page: Any, desk: Desk, materialized: None) -> None:
    names = [page.get_by_text(name, exact=True) for name in ("floor", "regression", "calibration", "drift")]
    said = [page.get_by_text(text) for text in ("This is a blocking asset check", "Passed")]
    desk.see(page, "assets/digits/eval_report?view=checks", *names, *said, click=names[0])
    picture(page, "checks")


def test_the_live_view_changed_while_it_trained_and_the_cancelled_run_ended(
    desk: Desk, watched: tuple[str, str]
) -> None:
    before, after = (int(step.partition("/")[0]) for step in watched)
    assert before < after
    assert "CANCELED" in desk.runs(LONG)


def test_what_was_backfilled_is_not_done_again(desk: Desk, backfilled: None) -> None:
    done = desk.run(".venv/bin/mlpipes backfill digits " + " ".join(f"--scale {key}" for key in SHORT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Fresh, nothing to do: " + ", ".join(SHORT) in done.stdout


def test_a_backfill_from_the_command_line_goes_on_where_the_cancelled_run_stopped(desk: Desk, backfilled: None) -> None:
    (path,) = [p for p in (desk.home / "store").glob("trainings/*/") if not (p / "result.json").is_file()]
    done = desk.run(f".venv/bin/mlpipes backfill digits --scale {LONG} --smallest-first")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{LONG}: SUCCESS" in done.stdout
    assert (path / "result.json").is_file()
    assert '"resumed_from_step": 0' not in (path / "result.json").read_text()


def test_a_backfill_that_fails_says_so_and_where_to_look(desk: Desk) -> None:
    key = "w1-b256-e12-g0"
    done = desk.run(f".venv/bin/mlpipes backfill cifar10 --scale {key}")  # whose data are not there
    assert done.returncode == 1, done.stdout + done.stderr
    status, why, where = done.stdout.splitlines()[-3:]
    assert status == f"{key}: FAILURE"
    assert why.startswith("cifar10__dataset: ")
    assert "mlpipes fetch cifar10" in why
    assert "/runs/" in where


def test_the_schedule_is_switched_on_and_its_tick_judges_each_scale_once(
    page: Any, desk: Desk, backfilled: None
) -> None:
    nightly = "locations/mlpipes.definitions/schedules/digits_nightly"
    switch = page.locator("input[type=checkbox]").first

    def is_switched(wanted: bool) -> bool:
        desk.go(page, nightly)
        if comes(switch.count) and switch.is_checked() != wanted:
            switch.locator("xpath=..").click()
        return comes(lambda: switch.count() and switch.is_checked() == wanted)

    for wanted in (False, True):
        until(lambda wanted=wanted: is_switched(wanted), "the switch has moved", every=1)
    leave(page)
    until(lambda: all(desk.runs(key, "digits_evaluation") for key in SHORT), "a tick has judged each scale", every=1)
    desk.until_done(SHORT, "digits_evaluation")
    desk.see(page, nightly, page.get_by_text("requested"))
    picture(page, "nights")
    history = desk.run(f".venv/bin/mlpipes history digits {FIRST}")
    assert history.stdout.count("passed") >= 2
