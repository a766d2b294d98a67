"""The command line: `mlpipes demo | dev | backfill | status | checkpoints | replay | report | …`; `--help` lists all."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.markdown import Markdown
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import Progress
from rich.table import Table

from mlpipes.errors import ConfigError, UserError
from mlpipes.store import Store, home
from mlpipes.workloads.catalog import configured, entry_named

app = typer.Typer(
    help="Durable ML training as Dagster assets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
ray_app = typer.Typer(help="The private local Ray of this machine.", no_args_is_help=True)
app.add_typer(ray_app, name="ray")
doctor_app = typer.Typer(help="Say what a place to train needs and what is missing.", no_args_is_help=True)
app.add_typer(doctor_app, name="doctor")
console = Console()
_UNBOUNDED = 10_000
"""Columns of a terminal that cuts nothing."""


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Show a user's error as its message, without a traceback, and exit with 1."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except UserError as error:
            text = f"[bold red]{type(error).__name__}:[/] {escape(str(error))}"
            Console(stderr=True).print(text, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None

    return wrapped


def scale_named(workload: str, scale: str) -> str:
    """The key of a scale that the catalog has or the store knows: what was trained once stays reachable.

    Raises ConfigError for an unknown workload, ScaleError for an unknown scale.
    """
    from mlpipes.status import trained_scales

    return entry_named(workload).scale(scale, trained_scales(store(), workload)).key


def store() -> Store:
    """The store of this installation."""
    return Store(home() / "store")


@app.command()
@friendly
def demo(
    workload: Annotated[str, typer.Option(help="which workload")] = "digits",
    scale: Annotated[list[str] | None, typer.Option(help="scales to train; default: the first three")] = None,
) -> None:
    """Train a workload at several scales on a private local Ray, and compare them."""
    from mlpipes.demo import run_demo

    entry = entry_named(workload)
    scales = scale or [s.key for s in entry.scales][:3]
    for key in scales:
        entry.scale(key)
    run_demo(console, entry, scales, store())


@app.command()
@friendly
def dev(
    port: Annotated[int, typer.Option(help="port of the Dagster UI")] = 3000,
    mlflow: Annotated[bool, typer.Option(help="also serve the MLflow UI")] = False,
    mlflow_port: Annotated[int, typer.Option(help="port of the MLflow UI")] = 5000,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="show all that the servers print, too")] = False,
) -> None:
    """Serve the Dagster UI (and, if asked for, the MLflow UI) on this machine."""
    from mlpipes.development import serve

    serve(console, port, mlflow_port if mlflow else None, verbose=verbose)


@app.command()
@friendly
def scales() -> None:
    """List all workloads and their scales."""
    rows = [
        {
            "workload": entry.name,
            "scale": s.key,
            "workers": str(s.workers),
            "global batch": str(s.batch_size),
            "epochs": str(s.epochs),
            "GPUs/worker": f"{s.gpus_per_worker:g}",
            "CPUs/worker": f"{s.cpus_per_worker:g}",
        }
        for entry in configured()
        for s in entry.scales
    ]
    console.print(_fitting(rows, "CPUs/worker", "GPUs/worker", "epochs", "global batch"))


@app.command()
@friendly
def status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="keep showing it, until interrupted")] = False,
) -> None:
    """Show all trainings of the store, the latest first; also while Dagster and Ray are down."""
    from rich.live import Live

    if not watch:
        console.print(_status_table())
        return
    with Live(_status_table(), console=console, refresh_per_second=2) as live, suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)
            live.update(_status_table())


def _status_table() -> Group | str:
    from mlpipes.status import all_statuses, progress_text

    found = list(all_statuses(store()))
    if not found:
        return f"No training in {store().root} yet."
    failures = []
    for status in found:
        if status.state == "failed" and status.error:
            cause = escape(status.error.strip().partition("\n")[0])
            failures.append(f"[red]{status.workload} {status.scale} seed {status.seed}[/]: {cause}")
    rows = [progress_text(status) for status in found]
    return Group(_fitting(rows, "fingerprint", "checkpoint", "epoch", "samples/s", "seed"), *failures)


def _fitting(rows: Sequence[Mapping[str, str]], *expendable: str) -> Table:
    """A table of rows with equal keys, less the columns that a narrow terminal has no room for, the first named first."""
    names, left_over = list(rows[0]), list(expendable)
    while True:
        table = Table(*names, box=SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            table.add_row(*(row[name] for name in names))
        width = Measurement.get(console, console.options.update(width=_UNBOUNDED), table).maximum
        if width <= console.width or not left_over:
            return table
        names.remove(left_over.pop(0))


@app.command()
@friendly
def checkpoints(
    workload: Annotated[str, typer.Argument(help="which workload")],
    scale: Annotated[str, typer.Argument(help="which scale, e.g. w1-b128-e30-g0")],
    prune: Annotated[bool, typer.Option(help="remove all but the latest and the best of each training")] = False,
) -> None:
    """List and verify the checkpoints of a scale's trainings."""
    from mlpipes.status import checkpoint_rows, prune_checkpoints

    key = scale_named(workload, scale)
    if prune:
        console.print(f"Removed {prune_checkpoints(store(), workload, key)} checkpoints.")
    rows = list(checkpoint_rows(store(), workload, key))
    if not rows:
        console.print(f"No checkpoint of {workload} {key} in {store().root}.", soft_wrap=True)
        return
    console.print(_fitting(rows, "fingerprint"))


@app.command()
@friendly
def replay(
    workload: Annotated[str, typer.Argument(help="which workload")],
    scale: Annotated[str, typer.Argument(help="which scale, e.g. w1-b128-e30-g0")],
    run: Annotated[
        str | None, typer.Option(help="beginning of a fingerprint, an MLflow run or a Dagster run; default: the latest")
    ] = None,
) -> None:
    """Train again elsewhere, from the source data on, and compare data, order, every loss and the weights."""
    from mlpipes.compute.local import LocalRay
    from mlpipes.compute.places import jobs_for
    from mlpipes.replay import find_training
    from mlpipes.replay import replay as replay_training

    folder = find_training(store(), workload, scale_named(workload, scale), run)
    ours = LocalRay().status() is None
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as bar:
        task = bar.add_task(f"replaying {folder.fingerprint[:12]}", total=None)

        def show(message: Mapping[str, Any]) -> None:
            if message["kind"] == "progress":
                bar.update(task, completed=message["step"], total=message["total_steps"])

        try:
            found = replay_training(store(), folder, jobs_for, show)
        finally:
            if ours:  # a private Ray that was started for this
                LocalRay().stop()
    console.print(Markdown(found.markdown()))
    if not found.equal:
        raise typer.Exit(1)


@app.command()
@friendly
def report(
    workload: Annotated[str, typer.Argument(help="which workload")],
    deadline: Annotated[
        float | None, typer.Option(help="seconds of training that the recommended scale may take")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="what it may cost, at the price of a device-hour")] = None,
) -> None:
    """Make and print the scaling report of a workload, from what has been evaluated by now."""
    from mlpipes.scaling_report import make_report, prices_from_environment

    entry = entry_named(workload)
    text, _ = make_report(store(), entry, prices_from_environment(), deadline, budget).write(store(), entry)
    console.print(Markdown(text))
    console.print(f"{store().report(workload) / 'scaling_report.md'}", soft_wrap=True)


@app.command()
@friendly
def backfill(
    workload: Annotated[str, typer.Argument(help="which workload")],
    scale: Annotated[list[str] | None, typer.Option(help="which scales; default: all")] = None,
    smallest_first: Annotated[
        bool, typer.Option(help="one backfill a scale, the cheapest with the first turn")
    ] = False,
    again: Annotated[bool, typer.Option(help="also scales that are fresh")] = False,
    detach: Annotated[bool, typer.Option(help="launch, and do not wait")] = False,
    ui: Annotated[str | None, typer.Option(help="address of the Dagster UI; default: that of `mlpipes dev`")] = None,
) -> None:
    """Materialize a workload's whole chain for its scales in a running Dagster; goes on with what is half done."""
    from mlpipes.backfill import DagsterUi, launch

    entry = entry_named(workload)
    scales = [entry.scale(key) for key in scale] if scale else list(entry.scales)
    dagster = DagsterUi(ui)
    with console.status(f"Waiting for Dagster at {dagster.address} …"):
        dagster.wait_for(entry.name)
    made, fresh = launch(dagster, entry, scales, smallest_first=smallest_first, again=again)
    if fresh:
        console.print(f"Fresh, nothing to do: {', '.join(fresh)}")
    if made is None:
        return
    console.print(f"Launched: {', '.join(made.scales)} ({', '.join(made.ids)})")
    if detach:
        return
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as bar:
        task = bar.add_task("backfill", total=len(made.scales))
        for statuses in made.watch():
            done = sum(status in ("SUCCESS", "FAILURE", "CANCELED") for status in statuses.values())
            running = [key for key, status in statuses.items() if status == "STARTED"]
            bar.update(task, completed=done, description=", ".join(running) or "waiting")
    for key, status in made.scales.items():
        why = f"; why: {made.ui.address}/runs/{made.runs[key]}" if status == "FAILURE" else ""
        console.print(f"{key}: {status}{why}", soft_wrap=True)
    if any(status != "SUCCESS" for status in made.scales.values()):
        raise typer.Exit(1)


@app.command()
@friendly
def fetch(dataset: Annotated[str, typer.Argument(help="cifar10")]) -> None:
    """Download a data set that is not embedded."""
    from mlpipes.data.sources import fetch_cifar10

    if dataset != "cifar10":
        raise ConfigError(f"unknown data set {dataset!r}; known is cifar10 (digits is embedded)")
    console.print(f"CIFAR-10 is in {fetch_cifar10()}", soft_wrap=True)


@ray_app.command("up")
@friendly
def ray_up() -> None:
    """Start the private local Ray, if it does not run."""
    from mlpipes.compute.local import LocalRay

    address = LocalRay().ensure()
    console.print(
        f"Ray runs; dashboard {address.dashboard}, token in {address.environment['RAY_AUTH_TOKEN_PATH']}",
        soft_wrap=True,
    )


@ray_app.command("down")
@friendly
def ray_down() -> None:
    """End the private local Ray and every training in it; they go on from their checkpoints when asked for again."""
    from mlpipes.compute.local import LocalRay

    console.print("Ray ended." if LocalRay().stop() else "No local Ray runs.")


@ray_app.command("status")
@friendly
def ray_status() -> None:
    """Say whether the private local Ray runs."""
    from mlpipes.compute.local import LocalRay

    state = LocalRay().status()
    console.print(f"Ray runs (pid {state['pid']}); dashboard {state['dashboard']}" if state else "No local Ray runs.")


@doctor_app.command("slurm")
@friendly
def doctor_slurm(probe: Annotated[bool, typer.Option(help="also send a small job to a node")] = False) -> None:
    """Look at everything that training on Slurm needs, and say what is missing."""
    from mlpipes.doctor import examine_slurm

    good = True
    for found in examine_slurm(configured(), store(), probe=probe):
        good &= found.good
        mark = "[green]good[/]   " if found.good else "[bold red]missing[/]"
        console.print(f"{mark} {found.what}: ", end="")
        console.print(found.detail, soft_wrap=True, markup=False, highlight=False)
    if not good:
        raise typer.Exit(1)


def dagster_home() -> Path:
    """Set DAGSTER_HOME, where it is not set, to the checkout (its dagster.yaml keeps history), else to the home folder."""
    if configured_home := os.environ.get("DAGSTER_HOME"):
        return Path(configured_home)
    here = Path.cwd()
    folder = here if (here / "dagster.yaml").is_file() else home() / "dagster"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["DAGSTER_HOME"] = str(folder)
    return folder


from mlpipes import cli_models  # noqa: E402, F401 - adds its commands to `app`
