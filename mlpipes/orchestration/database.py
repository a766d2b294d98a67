"""Steps that outlive Dagster's database: one that is away for a while fails no step that only waits."""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg
from sqlalchemy.exc import InterfaceError, OperationalError
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

from mlpipes.errors import UserError

AWAY_SECONDS = 1800.0
"""How long a step waits for the database; then its run crashes, and is repeated as any run whose process died."""
_LOOK_SECONDS = 5.0
_TIMES = 20
"""How often one step may lose the database."""
_MLFLOW = "MlflowException"  # by name: MLflow is heavy to import


@contextmanager
def outlives_database(context: dg.AssetExecutionContext) -> Iterator[None]:
    """Has a step made again, in the same run, once the database that it lost is back: what it follows goes on meanwhile.

    Dagster's client of PostgreSQL gives up after ten seconds or so, which would be an error of the step, and no retry policy
    repeats those. Raises RetryRequested; whatever else is raised inside passes.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_database(error):
            raise
        Retrying(
            retry=retry_if_exception(_is_of_database),
            stop=stop_after_delay(AWAY_SECONDS),
            wait=wait_fixed(_LOOK_SECONDS),
            reraise=True,
        )(context.instance.get_run_by_id, context.run.run_id)
        context.log.warning("Dagster's database was away; this step is made again, and goes on where it was")
        raise dg.RetryRequested(max_retries=_TIMES) from error


def _is_of_database(error: BaseException) -> bool:
    """Whether an error, or one that led to it, is that of a PostgreSQL that cannot be reached.

    MLflow's own is not meant, nor one that was noticed while something else ended the step: an error of the user's, or an
    interruption.
    """
    chain = list(_chain(error))
    if any(isinstance(e, UserError) or not isinstance(e, Exception) or type(e).__name__ == _MLFLOW for e in chain):
        return False
    found = [e.orig for e in chain if isinstance(e, OperationalError | InterfaceError)]
    return any(type(original).__module__.startswith("psycopg") for original in found)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
