"""A step that loses Dagster's database goes on when it is back; no other error is taken for that."""

from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest
import sqlalchemy
from dagster_postgres.utils import DagsterPostgresException, retry_pg_connection_fn

from mlpipes.errors import ConfigError
from mlpipes.orchestration import database
from mlpipes.orchestration.database import outlives_database


def connect() -> Any:
    """What Dagster does where nothing listens: raises, after it has tried a few times."""
    engine = sqlalchemy.create_engine("postgresql+psycopg2://127.0.0.1:9/nothing")
    return retry_pg_connection_fn(engine.connect, retry_limit=1, retry_wait=0.01)


def made(losses: Iterator[Any]) -> dg.DagsterInstance:
    """Materialize an asset that calls what each look is to call; returns the instance with its run."""
    instance = dg.DagsterInstance.ephemeral()

    @dg.asset
    def followed(context: dg.AssetExecutionContext) -> int:
        with outlives_database(context):
            next(losses)()
        return 1

    assert dg.materialize([followed], instance=instance, raise_on_error=False) is not None
    return instance


def kinds(instance: dg.DagsterInstance) -> list[str]:
    """The kinds of a run's events."""
    (run,) = instance.get_runs()
    return [e.dagster_event.event_type_value for e in instance.all_logs(run.run_id) if e.dagster_event]


def test_a_lost_database_is_waited_for_and_the_step_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_LOOK_SECONDS", 0.01)
    away, known = [connect, connect], dg.DagsterInstance.get_run_by_id

    def looked(instance: dg.DagsterInstance, run_id: str) -> Any:
        return away.pop()() if away and made_again else known(instance, run_id)

    made_again: list[bool] = []

    def lose() -> None:
        made_again.append(True)
        connect()

    monkeypatch.setattr(dg.DagsterInstance, "get_run_by_id", looked)
    found = kinds(made(iter([lose, lambda: None])))
    assert not away
    assert found.count("STEP_UP_FOR_RETRY") == 1
    assert "STEP_RESTARTED" in found
    assert "STEP_SUCCESS" in found


def of_mlflow() -> None:
    from mlflow.exceptions import MlflowException

    try:
        connect()
    except Exception as error:
        raise MlflowException("its own database is away") from error


def of_the_user() -> None:
    try:
        connect()
    except Exception as error:
        raise ConfigError("something else") from error


def of_a_file() -> None:
    sqlalchemy.create_engine("sqlite:////nowhere/at/all.db").connect()


def test_an_interruption_stays_one() -> None:
    with pytest.raises(DagsterPostgresException), outlives_database(dg.build_asset_context()):
        try:
            raise KeyboardInterrupt
        except BaseException:
            connect()  # as whoever asks whether the run was cancelled


@pytest.mark.parametrize("loss", [of_mlflow, of_the_user, of_a_file, lambda: 1 / 0])
def test_another_error_fails_the_step_at_once(loss: Any) -> None:
    found = kinds(made(iter([loss])))
    assert "STEP_UP_FOR_RETRY" not in found
    assert "STEP_FAILURE" in found
