"""A job of Dagster that waits in its pod until a test lets it end."""

import time
from pathlib import Path

import dagster as dg


@dg.op(config_schema=str)
def waits(context: dg.OpExecutionContext) -> None:
    """Waits for a file, whose path is its config."""
    context.log.info("waits")
    while not Path(context.op_config).exists():
        time.sleep(0.2)


@dg.job
def waiting() -> None:
    """One step."""
    waits()
