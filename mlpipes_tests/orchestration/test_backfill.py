"""Waiting for a backfill: retries of crashed runs count, and what Dagster calls failed too soon is waited for."""

from collections.abc import Iterator
from typing import Any

import pytest

from mlpipes.errors import ConfigError
from mlpipes.orchestration import backfill
from mlpipes.orchestration.backfill import Backfill, DagsterUi


def run(status: str, retry: int = 0, **tags: str) -> dict[str, Any]:
    known = {"dagster/partition": "w1-b1-e1-g0"}
    known |= {"dagster/retry_number": str(retry), "dagster/root_run_id": "r0"} if retry else {}
    known |= {f"dagster/{name}": value for name, value in tags.items()}
    return {
        "runId": f"r{retry}",
        "status": status,
        "tags": [{"key": key, "value": value} for key, value in known.items()],
    }


class Answers:
    """Stands for a Dagster that gives one answer after the other, and the last one for ever.

    As with Dagster, a backfill that is over does not list the retries that come after.
    """

    def __init__(self, *answers: tuple[str, list[dict[str, Any]]]) -> None:
        self.answers = list(answers)
        self.retries: list[dict[str, Any]] = []

    def ask_patiently(self, query: str, **variables: Any) -> dict[str, Any]:
        if "runsOrError" in query:
            assert variables == {"root": "r0"}
            return {"runsOrError": {"results": self.retries}}
        status, runs = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.retries = [run for run in runs if run["runId"] != "r0"]
        return {"partitionBackfillOrError": {"status": status, "runs": [run for run in runs if run["runId"] == "r0"]}}


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [0.0]
    monkeypatch.setattr(backfill.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(backfill.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return iter([now])


def watched(*answers: tuple[str, list[dict[str, Any]]]) -> list[str]:
    made: Any = Backfill(Answers(*answers), ["b"], {"w1-b1-e1-g0": "REQUESTED"})  # pyright: ignore[reportArgumentType]
    return [statuses["w1-b1-e1-g0"] for statuses in made.watch()]


def test_a_retry_that_comes_late_is_waited_for() -> None:
    crashed = run("FAILURE")
    statuses = watched(
        ("REQUESTED", []),
        ("REQUESTED", [run("STARTED")]),
        ("COMPLETED_FAILED", [crashed]),
        ("COMPLETED_FAILED", [run("STARTED", 1), crashed]),
        ("COMPLETED_FAILED", [run("SUCCESS", 1), crashed]),
    )
    assert statuses == ["REQUESTED", "STARTED", "FAILURE", "STARTED", "SUCCESS"]


def test_a_failed_step_is_final_at_once() -> None:
    assert watched(("COMPLETED_FAILED", [run("FAILURE", failure_reason="STEP_FAILURE")])) == ["FAILURE"]


def test_a_crash_without_a_retry_is_final_after_a_while() -> None:
    statuses = watched(("COMPLETED_FAILED", [run("FAILURE")]))
    assert set(statuses) == {"FAILURE"}
    assert 40 < len(statuses) < 60


def test_a_dagster_that_has_just_been_started_is_waited_for() -> None:
    ui, answers = DagsterUi("http://nowhere"), [ConfigError("no Dagster answers"), {}, {"id": "digits/dataset"}]

    def ask(query: str, **variables: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, ConfigError):
            raise answer
        return {"assetNodeOrError": answer}

    ui.ask = ask  # type: ignore[method-assign]
    ui.wait_for("digits")
    assert not answers
    answers = [{}] * 1000
    with pytest.raises(ConfigError, match="no asset digits/dataset"):
        ui.wait_for("digits")
    assert len(answers) > 950
