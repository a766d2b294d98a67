"""Backfills: what is launched, and waiting for it, where retries count and what Dagster calls failed too soon does not."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlpipes.errors import ConfigError
from mlpipes.orchestration import backfill
from mlpipes.orchestration.backfill import DEFAULT_UI, DEV_NOTE, Backfill, DagsterUi, launch
from mlpipes.orchestration.resources import STORE
from mlpipes.scales import scales_of
from mlpipes.store.files import write_record
from mlpipes.store.identity import identify, identity_of
from mlpipes.store.layout import Store
from mlpipes.store.references import (
    CHAIN,
    ChampionReference,
    DatasetReference,
    EvaluationReference,
    ModelReference,
    SnapshotReference,
    TrainingReference,
)
from mlpipes.workloads.catalog import Entry


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
    assert 145 < len(statuses) < 160  # a look takes two seconds


def test_the_ui_of_a_running_dev_of_this_home_is_asked_unless_another_is_named(isolated_home: Path) -> None:
    assert DagsterUi().address == DEFAULT_UI
    write_record(isolated_home / DEV_NOTE, {"port": 3456, "pid": os.getpid()})
    assert DagsterUi().address == "http://127.0.0.1:3456"
    assert DagsterUi("http://other").address == "http://other"
    gone = subprocess.Popen(["true"])
    gone.wait()
    write_record(isolated_home / DEV_NOTE, {"port": 3456, "pid": gone.pid})
    assert DagsterUi().address == DEFAULT_UI
    (isolated_home / DEV_NOTE).write_text("torn")
    assert DagsterUi().address == DEFAULT_UI


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


SCALE = "w1-b1-e1-g0"
ENTRY = Entry("w", "Made up", "nowhere:workload", scales_of([SCALE], "test"))


class Freshness:
    """A Dagster that holds every asset for fresh (but those named), materialized into the store with an id."""

    def __init__(self, identity: str | None, *stale: str) -> None:
        self.identity, self.stale, self.launched = identity, stale, list[Any]()

    def ask(self, query: str, **variables: Any) -> Any:
        if "launchPartitionBackfill" in query:
            self.launched += variables["params"]["partitionNames"]
            return {"launchPartitionBackfill": {"backfillId": "b"}}
        entries = [{"label": "digest"}] + ([{"label": STORE, "text": self.identity}] if self.identity else [])
        status = "STALE" if variables["key"]["path"][1] in self.stale else "FRESH"
        return {"assetNodeOrError": {"staleStatus": status, "assetMaterializations": [{"metadataEntries": entries}]}}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with all that the chain of a scale leaves behind."""
    store = Store(tmp_path / "store")
    identify(store)
    training = store.training("f")
    for folder in (store.snapshots / "d", training.model, training.evaluation("e")):
        folder.mkdir(parents=True)
    training.result.touch()
    trained = {"fingerprint": "f", "mlflow_run_id": "r", "snapshot": "d"}
    registered = trained | {"registered_model": "m", "version": "1"}
    evaluated = registered | {"evaluation": "e", "estimates": {}}
    for reference in (
        DatasetReference(digest="source", provenance={}, counts={}),
        SnapshotReference(digest="d"),
        TrainingReference.model_validate(trained),
        ModelReference.model_validate(registered),
        EvaluationReference.model_validate(evaluated),
        ChampionReference.model_validate(evaluated | {"champion": "1"}),
    ):
        store.write_reference(reference, "w", SCALE)
    return store


def launched(answers: Freshness, store: Store, *, again: bool = False) -> tuple[list[str], list[str]]:
    """What was launched, and what was passed over as fresh."""
    ui = DagsterUi("http://nowhere")
    ui.ask = answers.ask  # type: ignore[method-assign]
    _, fresh = launch(ui, ENTRY, ENTRY.scales, store, smallest_first=False, again=again)
    return answers.launched, fresh


@pytest.mark.parametrize(
    "query", [name for name, value in vars(backfill).items() if str(value).startswith(("query", "mut"))]
)
def test_questions_are_ones_that_dagster_answers(query: str) -> None:
    from dagster_graphql.schema import create_schema
    from graphql import parse, validate

    assert validate(create_schema().graphql_schema, parse(vars(backfill)[query])) == []


def test_fresh_is_what_dagster_says_and_the_store_has(store: Store) -> None:
    identity = identity_of(store)
    assert launched(Freshness(identity), store) == ([], [SCALE])
    assert launched(Freshness(identity, "model"), store) == ([SCALE], [])
    assert launched(Freshness(identity), store, again=True) == ([SCALE], [])
    assert launched(Freshness(None), store) == ([], [SCALE]), "materialized before stores had ids"


@pytest.mark.parametrize("asset", CHAIN)
def test_a_reference_that_is_gone_is_launched_again(store: Store, asset: str) -> None:
    (store.root / "assets" / "w" / asset / f"{SCALE}.json").unlink()
    assert launched(Freshness(identity_of(store)), store) == ([SCALE], [])


@pytest.mark.parametrize(
    "gone",
    ["snapshots/d", "trainings/f", "trainings/f/result.json", "trainings/f/model", "trainings/f/evaluations/e"],
)
def test_what_a_reference_points_to_must_be_there(store: Store, gone: str) -> None:
    (store.root / gone).rename(store.root / "elsewhere")
    assert launched(Freshness(identity_of(store)), store) == ([SCALE], [])


@pytest.mark.parametrize("identity", ["another", None])
def test_a_store_that_cannot_be_seen_from_here_is_said_not_guessed(tmp_path: Path, identity: str | None) -> None:
    here = Store(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"w/dataset w1-b1-e1-g0 is materialized.*nothing is empty.*MLPIPES_HOME"):
        launched(Freshness(identity), here)
    assert not here.root.exists(), "looking leaves nothing behind"
    assert launched(Freshness(identity), here, again=True) == ([SCALE], [])


def test_another_store_than_dagsters_is_named_with_it(store: Store) -> None:
    with pytest.raises(ConfigError, match=f"in store another, but .* is store {identity_of(store)}"):
        launched(Freshness("another"), store)
    (store.root / "store.json").unlink()
    with pytest.raises(ConfigError, match="has no id"):
        launched(Freshness("another"), store)


def test_why_a_run_failed_is_found_on_whatever_page_of_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(name: str, description: str | None) -> dict[str, Any]:
        failure = {"description": description} if description else None
        return {"stepKey": name, "failureMetadata": failure, "error": {"message": "DagsterError: in the op\n"}}

    pages = {
        None: ("one", [{}, {}]),
        "one": ("two", [{}, step("data", "no file")]),
        "two": ("three", [step("next", None)]),
    }

    def ask(_: Any, query: str, run: str, cursor: str | None) -> dict[str, Any]:
        following, events = pages[cursor]
        return {"logsForRun": {"cursor": following, "hasMore": following != "three", "events": events}}

    monkeypatch.setattr(DagsterUi, "ask", ask)
    assert DagsterUi().failure("r") == "data: no file"
    pages["one"] = ("two", [])
    assert DagsterUi().failure("r") == "next: DagsterError: in the op"
    pages["two"] = ("three", [{"message": "its code server is gone", "error": None}])
    assert DagsterUi().failure("r") == "its code server is gone"
    pages["two"] = ("three", [])
    assert DagsterUi().failure("r") == ""
