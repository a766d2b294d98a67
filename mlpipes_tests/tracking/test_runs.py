"""MLflow runs against a real SQLite store."""

from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from mlpipes.errors import ConfigError
from mlpipes.tracking.runs import Tracker, default_uri
from mlpipes_tests import prepared


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return Tracker(prepared.mlflow_store(tmp_path_factory.mktemp("mlflow") / "mlflow.db"))


def run_of(tracker: Tracker, fingerprint: str) -> str:
    return tracker.run_of("experiment", fingerprint, "name", {"a": 1}, {"tag": "x"})


def test_a_fingerprint_has_one_run_however_often_it_is_asked_for(tracker: Tracker, isolated_home: Path) -> None:
    first = run_of(tracker, "f" * 64)
    assert run_of(tracker, "f" * 64) == first
    assert run_of(tracker, "e" * 64) != first


def test_what_was_deleted_in_mlflow_is_restored_with_a_warning(
    tmp_path: Path, isolated_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(prepared.mlflow_store(tmp_path / "mlflow.db"))
    run_id = run_of(tracker, "f" * 64)
    tracker.client.delete_experiment(tracker.experiment("experiment"))
    assert run_of(tracker, "f" * 64) == run_id
    assert "experiment experiment was deleted; it is restored" in caplog.text
    tracker.client.delete_run(run_id)
    assert run_of(tracker, "f" * 64) == run_id
    assert f"run {run_id} was deleted; it is restored" in caplog.text
    tracker.log_values(run_id, {"a": 1.0})


def test_rows_sent_twice_stay_single(tracker: Tracker, isolated_home: Path) -> None:
    run_id = run_of(tracker, "d" * 64)
    rows = [["train/loss", 1.0 / step, step, 1_700_000_000_000 + step] for step in range(1, 1501)]
    tracker.log_history(run_id, rows[:900])
    tracker.log_history(run_id, rows)
    history = tracker.client.get_metric_history(run_id, "train/loss")
    assert [(m.key, m.value, m.step, m.timestamp) for m in history] == [tuple(row) for row in rows]


def test_rows_that_another_process_adds_at_the_same_moment_are_sent_again(
    tracker: Tracker, isolated_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, original, calls = run_of(tracker, "c" * 64), tracker.client.log_batch, []

    def log_batch(*arguments: Any, **named: Any) -> None:
        calls.append(arguments)
        original(*arguments, **named)
        if len(calls) == 1:  # as MLflow does when the driver was faster
            raise MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed: metrics.key")

    monkeypatch.setattr(tracker.client, "log_batch", log_batch)
    tracker.log_history(run_id, [["train/loss", 0.5, 1, 1_700_000_000_000]])
    assert len(calls) == 2
    assert len(tracker.client.get_metric_history(run_id, "train/loss")) == 1


def test_the_default_store_is_absolute_and_file_stores_are_refused(
    monkeypatch: pytest.MonkeyPatch, isolated_home: Path
) -> None:
    assert default_uri() == f"sqlite:///{isolated_home}/mlflow/mlflow.db"
    for uri in ("file:///somewhere", "./mlruns"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(ConfigError, match="dropped file stores"):
            default_uri()


def test_no_password_is_shown(tracker: Tracker) -> None:
    tracker = object.__new__(Tracker)
    tracker.uri = "https://me:secret@mlflow.example:5000/path"
    assert tracker.public_uri == "https://mlflow.example:5000/path"
    assert "secret" not in tracker.command("r")
