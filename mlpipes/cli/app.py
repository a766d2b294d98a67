"""The command line: `mlpipes demo | dev | new | backfill | status | replay | report | …`; `--help` lists all."""

import typer

from mlpipes.cli import machine, models, new, serving, training, video

app = typer.Typer(
    help="Durable ML training as Dagster assets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

for part in (machine, training, models, serving, video, new):
    app.add_typer(part.app)
