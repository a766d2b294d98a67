"""Errors that a user can mend, as Dagster shows them."""

import dagster as dg
import pytest

from mlpipes.orchestration.metadata import user_errors


def test_an_mlflow_server_that_is_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with (
        pytest.raises(dg.Failure, match=r"the MLflow server does not answer.*nothing is lost") as caught,
        user_errors(),
    ):
        MlflowClient("http://127.0.0.1:9").search_experiments()
    assert "127.0.0.1" in str(caught.value.description)


def test_an_error_of_our_own_code_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), user_errors():
        _ = 1 / 0
