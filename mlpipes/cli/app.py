"""The command line: `mlpipes demo | dev | backfill | status | checkpoints | replay | report | …`; `--help` lists all."""

import typer

from mlpipes.cli import machine, models, training

app = typer.Typer(
    help="Durable ML training as Dagster assets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

for part in (machine, training, models):
    app.add_typer(part.app)
