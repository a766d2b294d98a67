"""The part of the command line about this machine: demo, dev, fetch, ray, doctor."""

from typing import Annotated

import typer
from rich.markup import escape

from mlpipes.cli.common import Config, Fresh, Seed, Set, console, ended_alike, friendly, tell_problems
from mlpipes.errors import ConfigError
from mlpipes.store.layout import default_store
from mlpipes.workloads.catalog import configured, entry_named, offered

app = typer.Typer()
ray_app = typer.Typer(help="The private local Ray of this machine.", no_args_is_help=True)
app.add_typer(ray_app, name="ray")
doctor_app = typer.Typer(help="Say what training needs and what is missing.", no_args_is_help=True)
app.add_typer(doctor_app, name="doctor")


@app.command()
@friendly
def demo(
    workload: Annotated[str, typer.Option(help="which workload")] = "digits",
    scale: Annotated[list[str] | None, typer.Option(help="scales to train; default: the first three")] = None,
    changes: Set = None,
    seed: Seed = None,
    fresh: Fresh = False,
    config: Config = None,
) -> None:
    """Train a workload at several scales on a private local Ray, and compare them."""
    from mlpipes.cli.demo import run_demo
    from mlpipes.orchestration.launchpad import settings_of

    entry = entry_named(workload)
    scales = scale or [s.key for s in entry.scales][:3]
    for key in scales:
        entry.scale(key)
    settings = settings_of(entry, config, changes or (), seed=seed, fresh=fresh)
    try:
        with ended_alike():
            run_demo(console, entry, scales, default_store(), settings)
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on where it was.")
        raise typer.Exit(130) from None


@app.command()
@friendly
def dev(
    port: Annotated[int, typer.Option(min=1, max=65535, help="port of the Dagster UI")] = 3000,
    mlflow: Annotated[bool, typer.Option(help="also serve the MLflow UI")] = False,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="port of the MLflow UI")] = 5000,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="show all that the servers print, too")] = False,
) -> None:
    """Serve the Dagster UI (and, if asked for, the MLflow UI) on this machine."""
    from mlpipes.orchestration.dev_server import serve

    tell_problems()
    serve(console, port, mlflow_port if mlflow else None, verbose=verbose)


@app.command()
@friendly
def fetch(dataset: Annotated[str, typer.Argument(help="cifar10")]) -> None:
    """Download a data set that is not embedded."""
    from mlpipes.data.sources import fetch_cifar10

    if dataset != "cifar10":
        raise ConfigError(f"unknown data set {dataset!r}; known is cifar10 (digits is embedded)")
    console.print(f"CIFAR-10 is in {fetch_cifar10()}", soft_wrap=True)


@app.command()
@friendly
def store(
    adopt: Annotated[
        bool, typer.Option("--adopt", help="have Dagster's history go with this store from now on")
    ] = False,
) -> None:
    """Say which store this is, and whether Dagster's history is about it."""
    from mlpipes.orchestration.store_identity import store_of_this_dagster

    console.print(store_of_this_dagster(adopting=adopt), soft_wrap=True)


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
    """End the private local Ray and every training in it; they resume from their checkpoints when asked for again."""
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
    from mlpipes.compute.slurm_doctor import examine_slurm

    good = True
    for found in examine_slurm({entry.name: entry.scales for entry in configured()}, default_store(), probe=probe):
        good &= found.good
        _finding(found.good, found.what, found.detail)
    if not good:
        raise typer.Exit(1)


@doctor_app.command("kubernetes")
@friendly
def doctor_kubernetes(probe: Annotated[bool, typer.Option(help="also send a pod to a node")] = False) -> None:
    """Look at everything that training on Kubernetes needs, and say what is missing and what mends it."""
    from mlpipes.compute.kubernetes_doctor import examine_kubernetes

    good = True
    for found in examine_kubernetes({entry.name: entry.scales for entry in configured()}, default_store(), probe=probe):
        good &= found.good
        _finding(found.good, found.what, found.detail)
    if not good:
        raise typer.Exit(1)


@doctor_app.command("workloads")
@friendly
def doctor_workloads() -> None:
    """Load every workload that another package adds, and say what is wrong with it."""
    good = True
    for offer in offered():
        problem = offer.problem
        if offer.entry:
            try:
                offer.entry.load()
            except Exception as error:  # whatever the package's code raises
                problem = problem or f"workload {offer.name!r} of {offer.packages}: {type(error).__name__}: {error}"
        good &= not problem
        detail = problem or f"{offer.entry and offer.entry.summary} ({offer.packages})"
        _finding(not problem, offer.name, detail, bad="wrong  ")
    if not offered():
        console.print("No package adds a workload. `mlpipes new` writes one to start from.")
    if not good:
        raise typer.Exit(1)


def _finding(good: bool, what: str, detail: str, bad: str = "missing") -> None:
    mark = "[green]good[/]   " if good else f"[bold red]{bad}[/]"
    console.print(f"{mark} {escape(what)}: ", end="")
    console.print(detail, soft_wrap=True, markup=False, highlight=False)
