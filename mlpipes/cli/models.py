"""The part of the command line about models: promote, rollback, compare, history, predict."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mlpipes.cli.common import console, ended_alike, friendly, scale_named
from mlpipes.errors import ConfigError
from mlpipes.store.layout import default_store
from mlpipes.store.references import ModelReference
from mlpipes.workloads.catalog import configured, entry_named

if TYPE_CHECKING:
    from mlpipes.data.image_file import Decoder
    from mlpipes.serving.batch import Job

app = typer.Typer()


@app.command()
@friendly
def promote(
    workload: Annotated[str, typer.Argument(help="which workload")],
    scale: Annotated[str, typer.Argument(help="whose latest model, e.g. w1-b128-e30-g0")],
    reason: Annotated[str, typer.Option(help="why; recorded")],
    force: Annotated[bool, typer.Option(help="also if the gates did not let it pass")] = False,
) -> None:
    """Make a scale's latest model the champion of its workload."""
    from mlpipes.evaluation.records import evaluations_of
    from mlpipes.tracking.champion import Champions
    from mlpipes.tracking.models import registered_name
    from mlpipes.tracking.runs import Tracker, existing_uri

    key = scale_named(workload, scale)
    champions = Champions(Tracker(existing_uri()), registered_name(workload))
    version = champions.of_scale(key)
    mine = [e for e in evaluations_of(default_store(), workload, key) if e.meta.fingerprint == version.fingerprint]
    if not (mine and mine[-1].is_good) and not force:
        raise ConfigError(
            f"the gates did not let version {version.version} pass, or were not asked; --force promotes it all the same"
        )
    champions.promote(version.version, reason, by_hand=True)
    console.print(f"{champions.name} version {version.version} ({key}) is champion.")
    console.print(f"Automation keeps it until you say `mlpipes release {workload}`.")


@app.command()
@friendly
def release(workload: Annotated[str, typer.Argument(help="which workload")]) -> None:
    """Let automation choose a workload's champion again, after one was chosen by hand."""
    from mlpipes.tracking.champion import Champions
    from mlpipes.tracking.models import registered_name
    from mlpipes.tracking.runs import Tracker, existing_uri

    entry_named(workload)
    now = Champions(Tracker(existing_uri()), registered_name(workload)).release()
    console.print(f"Version {now.version} is champion until a better one passes the gates.")


@app.command()
@friendly
def rollback(
    workload: Annotated[str, typer.Argument(help="which workload")],
    reason: Annotated[str, typer.Option(help="why; recorded")],
) -> None:
    """Give the alias `champion` back to the model that had it before."""
    from mlpipes.tracking.champion import Champions
    from mlpipes.tracking.models import registered_name
    from mlpipes.tracking.runs import Tracker, existing_uri

    entry_named(workload)
    lost, now = Champions(Tracker(existing_uri()), registered_name(workload)).roll_back(reason)
    console.print(f"Version {now} is champion again; version {lost} is not any more.")


@app.command()
@friendly
def compare(
    first: Annotated[
        str, typer.Argument(help="workload/scale, or workload/scale@run, e.g. digits/w1-b128-e30-g0@3f2a")
    ],
    second: Annotated[str, typer.Argument(help="the other one")],
) -> None:
    """Compare two models: what differs in data, settings, code and environment, and in quality, with intervals."""
    from mlpipes.evaluation.compare import compare as compare_models
    from mlpipes.evaluation.compare import evaluation_named

    entries = configured()
    a, b = evaluation_named(default_store(), entries, first), evaluation_named(default_store(), entries, second)
    metric = entry_named(a.meta.workload).load().metric.name
    theirs = entry_named(b.meta.workload).load().metric.name
    if a.meta.workload != b.meta.workload and (metric != theirs or not a.same_rows(b)):
        raise ConfigError(
            f"{first} and {second} are models of different tasks: {a.meta.workload} is measured by {metric}, "
            f"{b.meta.workload} by {theirs}, on other test samples. Compare models of one workload"
        )
    console.print(Markdown(compare_models(default_store(), a, b, metric).markdown()))


@app.command()
@friendly
def history(
    workload: Annotated[str, typer.Argument(help="which workload")],
    scale: Annotated[str, typer.Argument(help="which scale, e.g. w1-b128-e30-g0")],
) -> None:
    """List all evaluations of a scale's models, and what the gates said."""
    from mlpipes.evaluation.gates import summary
    from mlpipes.evaluation.records import evaluations_of

    key, metric = scale_named(workload, scale), entry_named(workload).load().metric.name
    table = Table("when", "training", "weights", f"test {metric}", "gates")
    for evaluation in evaluations_of(default_store(), workload, key):
        meta, gates = evaluation.meta, summary(evaluation.verdict)
        table.add_row(
            *(evaluation.when, meta.fingerprint[:8], meta.weights[:8]),
            str(evaluation.estimate(metric)) if evaluation.has(metric) else "–",
            gates,
        )
    if not table.row_count:
        raise ConfigError(
            f"{workload} {key} has not been evaluated yet; materialize {workload}/eval_report first, in the UI or by "
            f"`mlpipes backfill {workload} --scale {key}`"
        )
    console.print(table)


@app.command()
@friendly
def predict(
    workload: Annotated[
        str | None, typer.Argument(help="which workload; one of texts, where there is no --input")
    ] = None,
    scale: Annotated[
        str | None, typer.Argument(help="which scale's model, e.g. w1-b64-e6-g0; with --input: default champion")
    ] = None,
    texts: Annotated[list[str] | None, typer.Argument(help="texts; none: one a line from standard input")] = None,
    pair: Annotated[
        list[str] | None, typer.Option(help="of a workload on pairs: the second text, once for each")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input", metavar="PATH", help="table (.parquet, .csv, .jsonl), array (.npy), or folder of pictures"
        ),
    ] = None,
    result: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="with --input: .parquet or .csv to write")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=256, help="with --input: processes that compute")] = 2,
    model: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="with --input: what `mlpipes export` wrote, instead of the champion"),
    ] = None,
) -> None:
    """Ask a model: about some texts, or all samples of a file or a folder; what was begun is gone on with."""
    if source is not None:
        if texts or pair or result is None:
            raise ConfigError("with --input, name an --output, and give no texts")
        _predict_file(workload, scale, model, source.expanduser(), result.expanduser(), workers)
        return
    if workload is None or scale is None or result is not None or model is not None:
        raise ConfigError(
            "name a workload, a scale and some texts, or a file of samples with --input and one to write with --output"
        )
    from mlpipes.data.snapshot import open_snapshot
    from mlpipes.training.model import load_model, predict_texts

    key = scale_named(workload, scale)
    reference = default_store().read_reference(ModelReference, workload, key)
    if reference is None:
        raise ConfigError(
            f"{workload} {key} has no model yet; materialize {workload}/model first, in the UI or by `mlpipes backfill "
            f"{workload} --scale {key}`"
        )
    snapshot = open_snapshot(default_store().snapshots / reference.snapshot)
    columns = snapshot.meta["columns"]
    if ("types" in columns or "text_pair" in columns) and pair is None:
        raise ConfigError(
            f"{workload} reads pairs of texts: give the second text of each with --pair, for example mlpipes predict "
            f'{workload} {key} "first text" --pair "second text"'
        )
    asked = texts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not asked or (pair is not None and len(pair) != len(asked)):
        raise ConfigError(
            f"give at least one text, and with --pair as many second texts as first ones (got {len(asked)} and "
            f"{len(pair or ())})"
        )
    answers = predict_texts(
        load_model(default_store().training(reference.fingerprint).model, snapshot), snapshot, asked, pair
    )
    table = Table("text", *answers)
    for row, text in enumerate(asked):
        cells = [column[row] for column in answers.values()]
        table.add_row(text, *(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells))
    console.print(table)


def _predict_file(
    workload: str | None, scale: str | None, model: Path | None, source: Path, result: Path, workers: int
) -> None:
    from mlpipes.serving.batch import check_target
    from mlpipes.serving.current import describe
    from mlpipes.serving.tables import rows_in

    check_target(result)
    if model is not None:
        if scale is not None:
            raise ConfigError("name a scale, or a folder with --model, not both")
        job = _job_of_folder(model.expanduser(), workload, source)
    elif workload is None:
        raise ConfigError("name a workload, or a folder with --model")
    else:
        job = _job_of_registry(workload, scale, source)
    console.print(f"{describe(job.model)} answers", markup=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(source.name, total=rows_in(job.source))
        found = 0

        def done(rows: int, computed: bool) -> None:
            nonlocal found
            found += 0 if computed else rows
            progress.advance(task, rows)

        try:
            with ended_alike():
                rows = job.run(result, workers, done)
        except KeyboardInterrupt:
            progress.stop()
            console.print("Stopped. The same command goes on where it was.")
            raise typer.Exit(130) from None
    if job.beyond:
        maximum = job.model.about["pixel_maximum"]
        text = f"Pixels of {source.name} are greater than {maximum}, the greatest that the model was trained on. Its "
        text += "answers mean nothing unless the pictures have that scale: bring them to it, and ask again."
        console.print(text, style="yellow", markup=False, soft_wrap=True)
    there = f", of which {found:,} were answered before" if found else ""
    console.print(f"{rows:,} answers are in {result}{there}.", markup=False, soft_wrap=True)


def _job_of_folder(model: Path, workload: str | None, source: Path) -> "Job":
    from mlpipes.serving.batch import Job
    from mlpipes.serving.current import Folder

    # Where another folder takes the place of this one meanwhile, the job goes on with what it began with.
    folder = model.resolve()
    registered = Folder(folder).wanted_now()
    identity = f"{registered.version}-{registered.source[:12]}"
    return Job.of(folder, source, default_store(), _decoder(workload) if workload else None, identity)


def _job_of_registry(workload: str, scale: str | None, source: Path) -> "Job":
    from mlpipes.serving.batch import Job
    from mlpipes.serving.current import Registry, Wanted
    from mlpipes.serving.model import fetched
    from mlpipes.tracking.champion import Champions
    from mlpipes.tracking.models import registered_name
    from mlpipes.tracking.runs import Tracker, existing_uri

    decoder, name, tracker = _decoder(workload), registered_name(workload), Tracker(existing_uri())
    version = Champions(tracker, name).of_scale(scale_named(workload, scale)).version if scale else None
    registered = Registry(lambda: tracker, Wanted(name, version), default_store()).wanted_now()
    return Job.of(fetched(tracker, registered, default_store()), source, default_store(), decoder)


def _decoder(workload: str) -> "Decoder | None":
    """What a workload's pictures were decoded with, if it was trained on a folder of them."""
    from mlpipes.data.image_folder import ImageFolder

    trained_on = entry_named(workload).load().source
    return trained_on.decoder if isinstance(trained_on, ImageFolder) else None
