"""Dagster's instance on this machine: where it keeps its history, and jobs executed in this process."""

import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from mlpipes.errors import ConfigError, UserError
from mlpipes.store.environment import path_in
from mlpipes.store.files import write_atomic
from mlpipes.store.layout import home
from mlpipes.workloads.entry import cause_of, place_of

_WRITTEN = "# Written by mlpipes at every start. To have other settings, remove this line."
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


def quiet_instance(folder: Path) -> Any:
    """The Dagster instance of a folder, less its capturing of what steps print.

    That would take the progress bars from the terminal into a log, and a `tail` for each step into the user's pipe, which
    must not outlive the demo.
    """
    from dagster import DagsterInstance
    from dagster._core.instance import InstanceRef

    nothing = {"module": "dagster._core.storage.noop_compute_log_manager", "class": "NoOpComputeLogManager"}
    return DagsterInstance.from_ref(InstanceRef.from_dir(str(folder), overrides={"compute_logs": nothing}))


def execute(
    job: Any, instance: Any, partition: str | None = None, config: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Execute a job in this process, quietly; `config` is that of its run.

    Raises UserError with the cause if a step fails by a user's error, or by an error that the workload's own code raises.
    """
    import dagster as dg

    from mlpipes.orchestration.run_launcher import EXECUTOR_TAG, this_process

    tags = {EXECUTOR_TAG: this_process()}  # or a daemon beside it would take the run for dead
    try:
        job.execute_in_process(instance=instance, partition_key=partition, run_config={**QUIET, **config}, tags=tags)
    except dg.Failure as failure:
        raise UserError(failure.description or str(failure)) from failure
    except Exception as error:
        if not place_of(error):
            raise
        raise UserError(f"{cause_of(error)}. The run in the Dagster UI (`mlpipes dev`) has the traceback.") from error


def execute_report(definitions: Any, instance: Any) -> None:
    """Materialize the scaling report of each workload in this process; `definitions` are Dagster's."""
    import dagster as dg

    keys = [spec.key for spec in definitions.resolve_all_asset_specs() if spec.key.path[-1] == "scaling_report"]
    job = dg.define_asset_job("report", dg.AssetSelection.assets(*keys))
    execute(dg.Definitions.merge(definitions, dg.Definitions(jobs=[job])).resolve_job_def("report"), instance)


def dagster_home() -> Path:
    """Set DAGSTER_HOME, where it is not set, to the current folder if it has a dagster.yaml, as the checkout has; else to
    `dagster` in the home folder: there is one history, wherever commands are given. A folder without settings of the
    user's own has ours.

    Raises ConfigError if it is set to what is no folder.
    """
    here = Path.cwd()
    folder = path_in("DAGSTER_HOME") or (here if (here / "dagster.yaml").is_file() else home() / "dagster")
    _write_settings(folder)
    os.environ["DAGSTER_HOME"] = str(folder)  # Dagster takes absolute ones only
    return folder


def _write_settings(folder: Path) -> None:
    """Have a dagster.yaml in a folder: without one, Dagster neither watches over runs nor limits them, and sends telemetry.

    One that was written so follows mlpipes when that changes; one of the user's own is left alone.
    """
    path = folder / "dagster.yaml"
    settings = yaml.safe_load(files("mlpipes.orchestration").joinpath("dagster.yaml").read_text(encoding="utf-8"))
    # Commands outside a checkout once had no settings, and kept their history in the folder itself.
    settings["storage"]["sqlite"]["base_dir"] = str(folder if (folder / "history").is_dir() else folder / "storage")
    settings["local_artifact_storage"]["config"]["base_dir"] = str(folder)
    settings["compute_logs"]["config"]["base_dir"] = str(folder / "logs")
    wanted = f"{_WRITTEN}\n{yaml.safe_dump(settings, sort_keys=False)}"
    found = path.read_text(encoding="utf-8") if path.is_file() else _WRITTEN
    if found.startswith(_WRITTEN) and found != wanted:
        write_atomic(path, wanted.encode())


def check_run_launcher(instance: Any) -> None:
    """Raises ConfigError if the run launcher that dagster.yaml names cannot be loaded.

    Dagster loads it when the first run is launched, and nobody looks for the reason then.
    """
    from dagster._check import CheckError

    try:
        _ = instance.run_launcher
    except CheckError as error:
        raise ConfigError(
            f"the run launcher that dagster.yaml names cannot be loaded: {error}. See docs/upgrading.md for what has moved."
        ) from error
