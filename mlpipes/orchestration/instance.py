"""Dagster's instance on this machine: where it keeps its history, and jobs executed in this process."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlpipes.environment import path_in
from mlpipes.errors import ConfigError, UserError
from mlpipes.store.layout import home

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
    """Execute a job in this process, quietly; `config` is that of its run. Raises UserError if a step fails."""
    import dagster as dg

    try:
        job.execute_in_process(instance=instance, partition_key=partition, run_config={**QUIET, **config})
    except dg.Failure as failure:
        raise UserError(failure.description or str(failure)) from failure


def execute_report(definitions: Any, instance: Any) -> None:
    """Materialize the scaling report of each workload in this process; `definitions` are Dagster's."""
    import dagster as dg

    keys = [spec.key for spec in definitions.resolve_all_asset_specs() if spec.key.path[-1] == "scaling_report"]
    job = dg.define_asset_job("report", dg.AssetSelection.assets(*keys))
    execute(dg.Definitions.merge(definitions, dg.Definitions(jobs=[job])).resolve_job_def("report"), instance)


def dagster_home() -> Path:
    """Set DAGSTER_HOME, where it is not set, to the checkout (its dagster.yaml keeps history), else to the home folder.

    Raises ConfigError if it is set to what is no folder.
    """
    if configured_home := path_in("DAGSTER_HOME"):
        os.environ["DAGSTER_HOME"] = str(configured_home)  # Dagster takes absolute ones only
        return configured_home
    here = Path.cwd()
    folder = here if (here / "dagster.yaml").is_file() else home() / "dagster"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["DAGSTER_HOME"] = str(folder)
    return folder


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
