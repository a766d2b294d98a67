"""The Dagster definitions: explicit lists composed, nothing else."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from mlpipes.compute.kubernetes_settings import SETTINGS_VARIABLE
from mlpipes.orchestration.assets import partitions_of, workload_assets
from mlpipes.orchestration.checks import workload_checks
from mlpipes.orchestration.jobs import jobs_of
from mlpipes.orchestration.pool_waiting import sleep_while_waiting
from mlpipes.orchestration.predictions import inputs_sensor, predictions_asset, predictions_jobs
from mlpipes.orchestration.resources import MlflowResource, RayResource, ReferenceIOManager, StoreResource
from mlpipes.orchestration.schedules import nightly
from mlpipes.orchestration.sensors import failure_message, lost_retries, reports_follow, tidy_kubernetes
from mlpipes.orchestration.video import video_assets, video_job, video_sensor
from mlpipes.orchestration.warm_runs import warm_runs
from mlpipes.training.code_version import unreadable
from mlpipes.workloads.catalog import Entry, configured, offered, problems


def build_defs(*, catalog: Sequence[Entry] | None = None, resources: Mapping[str, Any] | None = None) -> dg.Definitions:
    """All definitions of a catalog (default: as configured: the project's, what other packages add, the file of scales).

    With the default come the assets of videos, which belong to no workload.

    What is wrong with another package is a warning in the log of the code location, once. `resources` replaces resources by
    key: `store`, `ray`, `mlflow`, `io_manager`. Raises ScaleError for a bad scale file.
    """
    entries = configured() if catalog is None else tuple(catalog)
    if catalog is None:
        without_code = unreadable(offered())
        entries = tuple(entry for entry in entries if entry.name not in without_code)
        for problem in (*problems().values(), *without_code.values()):
            logging.getLogger(__name__).warning(problem)
    store, whole, answering = StoreResource(), catalog is None, predictions_jobs(entries)
    return dg.Definitions(
        assets=[
            *(asset for entry in entries for asset in (*workload_assets(entry), predictions_asset(entry))),
            *(video_assets() if whole else ()),
        ],
        asset_checks=[check for entry in entries for check in workload_checks(entry, partitions_of(entry))],
        jobs=[*jobs_of(entries), *answering, *([video_job()] if whole else [])],
        schedules=[nightly(entry) for entry in entries],
        sensors=[
            *(failure_message, reports_follow(), lost_retries),
            *([inputs_sensor(entries, answering)] if entries else []),
            *([video_sensor()] if whole else []),
            *([tidy_kubernetes] if os.environ.get(SETTINGS_VARIABLE) else []),
        ],
        # One process a run: when it dies, no step process is left behind that could train on beside the retry.
        executor=dg.in_process_executor,
        resources={
            "store": store,
            "ray": RayResource(),
            "mlflow": MlflowResource(),
            "io_manager": ReferenceIOManager(store=store),
            **(resources or {}),
        },
    )


warm_runs()
sleep_while_waiting()
defs = build_defs()
