"""The demo: a workload's whole chain at several scales in one process, with progress bars and one table at the end."""

import gc
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mlpipes.orchestration.instance import dagster_home, execute, execute_report, quiet_instance
from mlpipes.orchestration.store_identity import check_store
from mlpipes.scaling.table import COLUMNS, scaling_cells
from mlpipes.store.files import read_record
from mlpipes.store.layout import Store
from mlpipes.store.references import EvaluationReference
from mlpipes.store.status import Statuses
from mlpipes.workloads.catalog import Entry

if TYPE_CHECKING:
    from mlpipes.orchestration.training import TrainingConfig

WIDE = 150
"""Characters that the summary needs with one row a scale."""


def run_demo(
    console: Console, entry: Entry, scales: Sequence[str], store: Store, settings: "TrainingConfig | None" = None
) -> None:
    """Materialize the chain of each scale with its `settings`, and the scaling report; print the summary.

    Ends the Ray that it started, unless somebody else uses it by then. Raises UserError with the cause if a scale fails.
    """
    import logging
    import warnings

    from mlpipes.compute.local import LocalRay
    from mlpipes.compute.places import is_local
    from mlpipes.compute.ray_jobs import RayJobs
    from mlpipes.definitions import build_defs
    from mlpipes.orchestration.launchpad import described, run_config
    from mlpipes.orchestration.warm_runs import preload
    from mlpipes.tracking.runs import Tracker, answering_uri

    # One bar a scale is what people want to see.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*Add type hints")
    started, config = time.monotonic(), run_config(entry, settings)
    if settings is not None:
        console.print(f"Settings: {described(settings)}", markup=False, soft_wrap=True)
    ray = LocalRay()
    # Before anything is started: a workload that does not load needs none of it.
    local, uri = is_local(), answering_uri()
    metric, definitions = entry.load().metric.name, build_defs(catalog=[entry])
    try:
        with _garbage_left(), quiet_instance(dagster_home()) as instance, ThreadPoolExecutor(2) as pool:
            check_store(instance, store)  # which the first asset does, too, but a Ray later
            starting = "Starting a private Ray on loopback, and MLflow's store …"
            if not console.is_terminal:  # in which a status is not shown
                console.print(starting)
            with console.status(starting):
                tracker = pool.submit(Tracker, uri)
                ready = pool.submit(ray.ensure, passing=True) if local else None
                preload()
                if ready is not None:
                    ready.result()
                tracker.result()
            console.print(f"Ray and MLflow are ready after {time.monotonic() - started:.0f} s.")
            chain = definitions.resolve_job_def(f"{entry.name}_chain")
            with _bars(console) as bars:
                for key in scales:
                    _run_scale(
                        bars, store, entry.name, metric, key, lambda key=key: execute(chain, instance, key, config)
                    )
            if local:
                pool.submit(ray.release, RayJobs.submitted)  # reports need none; whatever it says, it says again below
            execute_report(definitions, instance)
    finally:
        if local:
            with console.status("Ending the Ray that was started …"):
                ray.release(RayJobs.submitted)
    _print_summary(console, entry, scales, store)
    console.print(f"Done in {time.monotonic() - started:.0f} s. `mlpipes dev` shows the same in the Dagster UI.")


@contextmanager
def _garbage_left() -> Iterator[None]:
    """What is imported stays: to look for garbage among it whenever there was a quarter more took two seconds."""
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _bars(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    return Progress(*columns, TimeElapsedColumn(), console=console)


def _run_scale(bars: Progress, store: Store, workload: str, metric: str, key: str, run: Any) -> None:
    """Run in a thread, and meanwhile show what the store tells of the scale's training."""
    bar = bars.add_task(f"{workload} {key}", total=None, figures="preparing")
    problem: list[BaseException] = []

    def target() -> None:
        try:
            run()
        except BaseException as error:
            problem.append(error)

    thread, began, statuses = threading.Thread(target=target, daemon=True), time.time(), Statuses(store)
    thread.start()
    while thread.is_alive():
        thread.join(0.3)
        for status in statuses.latest():
            if (status.workload, status.scale) == (workload, key) and status.last_heard >= began:
                figures = "starting workers"
                if status.total_steps:
                    value = status.metrics.get(f"validation_{metric}")
                    figures = "exporting, evaluating" if status.state == "finished" else f"{status.state}"
                    name = metric.replace("_", " ")
                    figures += f" · validation {name} {value:.4f}" if value is not None else ""
                bars.update(bar, completed=status.step, total=status.total_steps, figures=figures)
                break
    if problem:
        bars.update(bar, figures="[red]failed")
        raise problem[0]
    total = bars.tasks[bar].total or 1
    bars.update(bar, completed=total, total=total, figures="done")
    bars.stop_task(bar)


def _print_summary(console: Console, entry: Entry, scales: Sequence[str], store: Store) -> None:
    report = read_record(store.report(entry.name) / "scaling_report.json")
    title = f"{entry.name}: {report['metric']}, best epoch by validation, evaluated on test"
    rows = [row for row in report["rows"] if row["scale"] in scales]
    console.print(_table(title, [scaling_cells(row) for row in rows], narrow=console.width < WIDE))
    models = len({row["weights_digest"] for row in rows})
    if models == 1 < len(rows):
        console.print("Equal weights: the same model, bit for bit, whatever the number of workers.")
    console.print("train s and samples/s: time in steps only; no start-up, no evaluation, no checkpoints.")
    console.print(f"Report:   {store.report(entry.name) / 'scaling_report.md'}", soft_wrap=True)
    for row in rows:
        reference = store.read_reference(EvaluationReference, entry.name, row["scale"])
        if reference:
            folder = store.training(reference.fingerprint).evaluation(reference.evaluation)
            console.print(f"Pictures: {folder}", soft_wrap=True)


def _table(title: str, rows: Sequence[Sequence[str]], narrow: bool) -> Table:
    """One row a scale where the terminal is wide enough, else one column a scale."""
    table = Table(title=title)
    header, *lines = [COLUMNS, *rows] if not narrow else list(zip(COLUMNS, *rows, strict=True))
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table
