"""The part of the command line about training runs: scales, status, checkpoints, replay, report, backfill."""

import time
from contextlib import suppress
from typing import Annotated

import typer
from rich.console import Group
from rich.markdown import Markdown
from rich.markup import escape
from rich.progress import Progress

from mlpipes.cli.common import Config, Fresh, Seed, Set, console, fitting, friendly, scale_named, tell_problems
from mlpipes.compute.jobs import Event
from mlpipes.store.layout import default_store
from mlpipes.store.messages import Progressed
from mlpipes.workloads.catalog import configured, entry_named

app = typer.Typer()


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
    console.print(fitting(rows, "CPUs/worker", "GPUs/worker", "epochs", "global batch"))
    tell_problems()


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
    from mlpipes.store.status import all_statuses, progress_text

    found = list(all_statuses(default_store()))
    if not found:
        return f"No training in {default_store().root} yet."
    remarks = []
    for status in found:
        if status.state == "failed" and status.error:
            cause = escape(status.error.strip().partition("\n")[0])
            remarks.append(f"[red]{status.workload} {status.scale} seed {status.seed}[/]: {cause}")
        if status.state == "waiting":
            remarks.append(f"{status.workload} {status.scale} seed {status.seed} waits: {escape(status.reason)}")
    rows = [progress_text(status) for status in found]
    return Group(fitting(rows, "fingerprint", "checkpoint", "epoch", "samples/s", "seed"), *remarks)


@app.command()
@friendly
def checkpoints(
    workload: Annotated[str, typer.Argument(help="which workload")],
    scale: Annotated[str, typer.Argument(help="which scale, e.g. w1-b128-e30-g0")],
    prune: Annotated[bool, typer.Option(help="remove all but the latest and the best of each training")] = False,
) -> None:
    """List and verify the checkpoints of a scale's trainings."""
    from mlpipes.training.checkpoints import checkpoint_rows, prune_checkpoints

    key = scale_named(workload, scale)
    if prune:
        console.print(f"Removed {prune_checkpoints(default_store(), workload, key)} checkpoints.")
    rows = list(checkpoint_rows(default_store(), workload, key))
    if not rows:
        console.print(f"No checkpoint of {workload} {key} in {default_store().root}.", soft_wrap=True)
        return
    console.print(fitting(rows, "fingerprint"))


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
    from mlpipes.compute.places import is_local, jobs_for
    from mlpipes.compute.ray_jobs import RayJobs
    from mlpipes.evaluation.replay import replay as replay_training
    from mlpipes.store.status import find_training

    folder = find_training(default_store(), workload, scale_named(workload, scale), run)
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as bar:
        task = bar.add_task(f"replaying {folder.fingerprint[:12]}", total=None)

        def show(event: Event) -> None:
            if isinstance(event, Progressed):
                bar.update(task, completed=event.step, total=event.total_steps)

        local = is_local()
        try:
            if local:
                LocalRay().ensure(passing=True)
            found = replay_training(default_store(), folder, jobs_for, show)
        finally:
            if local:
                LocalRay().release(RayJobs.submitted)
    console.print(Markdown(found.markdown()))
    if not found.equal:
        raise typer.Exit(1)


@app.command()
@friendly
def report(
    workload: Annotated[str, typer.Argument(help="which workload")],
    deadline: Annotated[
        float | None, typer.Option(min=0, help="seconds of training that the recommended scale may take")
    ] = None,
    budget: Annotated[float | None, typer.Option(min=0, help="what it may cost, at the price of a device-hour")] = None,
) -> None:
    """Make and print the scaling report of a workload, from what has been evaluated by now."""
    from mlpipes.scaling.report import make_report, prices_from_environment

    entry = entry_named(workload)
    text, _ = make_report(default_store(), entry, prices_from_environment(), deadline, budget).write(
        default_store(), entry
    )
    console.print(Markdown(text))
    console.print(f"{default_store().report(workload) / 'scaling_report.md'}", soft_wrap=True)


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
    ui: Annotated[
        str | None, typer.Option(help="address of the Dagster UI; default: of this home's `mlpipes dev`")
    ] = None,
    changes: Set = None,
    seed: Seed = None,
    fresh: Fresh = False,
    config: Config = None,
) -> None:
    """Materialize a workload's whole chain for its scales in a running Dagster; resumes what is half done."""
    from mlpipes.orchestration.backfill import DagsterUi, launch
    from mlpipes.orchestration.launchpad import described, settings_of
    from mlpipes.training.code_version import code_version

    entry = entry_named(workload)
    code_version(entry.implementation)  # Dagster would only say that it has no such asset
    scales = [entry.scale(key) for key in scale] if scale else list(entry.scales)
    settings = settings_of(entry, config, changes or (), seed=seed, fresh=fresh)
    dagster = DagsterUi(ui)
    waiting = f"Waiting for Dagster at {dagster.address} …"
    if not console.is_terminal:  # in which a status is not shown
        console.print(waiting, soft_wrap=True)
    with console.status(waiting):
        dagster.wait_for(entry.name)
    if settings is not None:
        console.print(f"Settings: {described(settings)}", markup=False, soft_wrap=True)
    made, done = launch(
        dagster, entry, scales, default_store(), smallest_first=smallest_first, again=again, config=settings
    )
    if done:
        console.print(f"Fresh, nothing to do: {', '.join(done)}")
    if made is None:
        return
    console.print(f"Launched: {', '.join(made.scales)} ({', '.join(made.ids)})")
    if detach:
        return
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as bar:
        task = bar.add_task("backfill", total=len(made.scales))
        for statuses in made.watch():
            ended = sum(status in ("SUCCESS", "FAILURE", "CANCELED") for status in statuses.values())
            running = [key for key, status in statuses.items() if status == "STARTED"]
            bar.update(task, completed=ended, description=", ".join(running) or "waiting")
    for key, status in made.scales.items():
        console.print(f"{key}: {status}", soft_wrap=True)
        if status == "FAILURE":
            console.print(made.ui.failure(made.runs[key]), markup=False, soft_wrap=True)
            console.print(f"{made.ui.address}/runs/{made.runs[key]}", soft_wrap=True)
    if any(status != "SUCCESS" for status in made.scales.values()):
        raise typer.Exit(1)
