"""What people see in the Dagster UI: figures, tables, links and user errors turned into Dagster's terms."""

import base64
import errno
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import dagster as dg

from mlpipes.errors import UserError
from mlpipes.reporting.report import Report, Table, escaped
from mlpipes.store.redaction import redact

if TYPE_CHECKING:
    from mlpipes.tracking.runs import Tracker


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns an error that the user can mend into a failure with a clear message that no retry policy repeats.

    Dagster keeps the texts of errors and of their causes: none leaves with a secret in it.
    """
    try:
        with _without_secrets():
            yield
    except UserError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        text = f"the disk is full ({error.filename or error}). Make room, and materialize again."
        raise dg.Failure(description=text, allow_retries=False) from error
    except Exception as error:
        # By name, for MLflow is heavy to import. It has tried for minutes by then.
        if type(error).__name__ == "MlflowException" and "must be in the 'active' state" in str(error):
            text = f"MLflow's run was deleted ({str(error)[:200]}). Restore it, or materialize `checkpoints` again."
            raise dg.Failure(description=text, allow_retries=False) from error
        if type(error).__name__ != "MlflowException" or "Max retries exceeded" not in str(error):
            raise
        text = (
            "the MLflow server does not answer. A training that runs continues, and nothing is lost: start the server (or "
            f"correct MLFLOW_TRACKING_URI), and materialize again. {str(error)[:300]}"
        )
        raise dg.Failure(description=text, allow_retries=False) from error


@contextmanager
def _without_secrets() -> Iterator[None]:
    """Raises what is raised inside; if it or a cause has a secret in its text, another one without, and without a cause."""
    try:
        yield
    except Exception as error:
        whole = "".join(traceback.format_exception(error))
        if (clean := redact(whole)) == whole:
            raise
        if isinstance(error, UserError):
            raise type(error)(redact(str(error))) from None
        if isinstance(error, dg.Failure):
            raise dg.Failure(redact(error.description or ""), allow_retries=error.allow_retries) from None
        raise RuntimeError(clean) from None


def picture(png: bytes, alternative: str) -> dg.MarkdownMetadataValue:
    """A PNG shown inline."""
    return dg.MetadataValue.md(f"![{alternative}](data:image/png;base64,{base64.b64encode(png).decode()})")


def table(content: Table) -> dg.MarkdownMetadataValue:
    """A table shown inline."""
    return dg.MetadataValue.md(content.markdown())


def mapping_table(content: Mapping[str, Any]) -> dg.MarkdownMetadataValue:
    """Names and values shown as a table of two columns."""
    lines = [f"| {escaped(key)} | {escaped(value)} |" for key, value in content.items()]
    return dg.MetadataValue.md("\n".join(["| | |", "| --- | --- |", *lines]))


def run_link(tracker: "Tracker", run_id: str) -> dg.MetadataValue:
    """A link to a run in MLflow's UI where that has an address, and otherwise the command that would start it."""
    address = tracker.link(run_id)
    return dg.MetadataValue.url(address) if address else dg.MetadataValue.text(tracker.command(run_id))


def report_metadata(report: Report) -> dict[str, Any]:
    """Estimates as numbers (for Dagster's plots) with their intervals, other figures, pictures, and long tables."""
    metadata: dict[str, Any] = {}
    for name, estimate in report.estimates.items():
        metadata[name] = estimate.value
        metadata[f"{name}_95"] = str(estimate)
    metadata |= report.quantities
    for name, png in report.figures.items():
        metadata[f"{name}_plot"] = picture(png, name)
    for content in report.tables:
        metadata[content.title.lower().replace(" ", "_")] = table(content)
    return metadata
