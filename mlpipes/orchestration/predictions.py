"""The assets of predictions, one a workload, partitioned by file: what the champion answers; a sensor that finds files.

What is answered lies in the store, chunk by chunk: a run that is launched again goes on where another was killed.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import dagster as dg
from pydantic import Field

from mlpipes.errors import ConfigError
from mlpipes.orchestration.folders import settled
from mlpipes.orchestration.metadata import mapping_table, user_errors
from mlpipes.orchestration.resources import MlflowResource, StoreResource
from mlpipes.store.environment import path_in
from mlpipes.workloads.catalog import Entry

FOLDER_VARIABLE = "MLPIPES_INPUTS"
GROUP, POOL = "predictions", "prediction"
SUFFIXES = frozenset({".parquet", ".csv", ".jsonl", ".ndjson", ".npy"})
RESULTS = "answers"
"""The folder, in that of a workload's inputs, that the answers go to."""
_CHUNKS = 5
"""Of fewer, a speed says nothing."""


class PredictionsConfig(dg.Config):
    """What can be set when a file is launched."""

    version: str | None = Field(default=None, description="a registered version; default: the champion")
    workers: int = Field(default=2, ge=1, description="processes that compute; the answers are the same")
    format: Literal["parquet", "csv"] = "parquet"


def inputs_of(workload: str) -> dg.DynamicPartitionsDefinition:
    """One partition a file of the workload's folder in the one that `MLPIPES_INPUTS` names."""
    return dg.DynamicPartitionsDefinition(name=f"{workload}_inputs")


def _folder(workload: str) -> Path:
    folder = path_in(FOLDER_VARIABLE)
    if folder is None:
        raise ConfigError(f"{FOLDER_VARIABLE} is not set: name the folder with a folder of inputs for each workload")
    return folder / workload


def predictions_asset(entry: Entry) -> dg.AssetsDefinition:
    """What a workload's champion answers to the samples of a file."""

    @dg.asset(
        key=[entry.name, "predictions"],
        group_name=GROUP,  # of its own: assets of one group are launched together, and have the same partitions
        partitions_def=inputs_of(entry.name),
        deps=[dg.AssetDep(dg.AssetKey([entry.name, "champion"]), partition_mapping=dg.AllPartitionMapping())],
        owners=["team:ml-platform"],
        kinds={"pytorch"},
        pool=POOL,
        description="The champion's answers to all samples of a file, with the bits of its evaluation.",
    )
    def predictions(
        context: dg.AssetExecutionContext, config: PredictionsConfig, store: StoreResource, mlflow: MlflowResource
    ) -> dg.MaterializeResult:
        with user_errors():
            return _answer(context, entry, config, store, mlflow)

    return predictions


def _answer(
    context: dg.AssetExecutionContext,
    entry: Entry,
    config: PredictionsConfig,
    store: StoreResource,
    mlflow: MlflowResource,
) -> dg.MaterializeResult:
    from mlpipes.serving.batch import Job, labels_in
    from mlpipes.serving.current import Registry, Wanted
    from mlpipes.serving.model import fetched
    from mlpipes.tracking.models import registered_name

    source, tracker = _folder(entry.name) / context.partition_key, mlflow.tracker()
    wanted = Wanted(registered_name(entry.name), config.version)
    registered = Registry(lambda: tracker, wanted, store.store).wanted_now()
    job = Job.of(fetched(tracker, registered, store.store), source, store.store)
    if job.model.caveat:
        context.log.warning(f"not exactly as it was evaluated: {job.model.caveat}")
    target = source.parent / RESULTS / f"{source.stem}.{config.format}"
    target.parent.mkdir(exist_ok=True)
    computed: list[tuple[float, int]] = []

    def done(rows: int, now: bool) -> None:
        if now:
            computed.append((time.monotonic(), rows))

    rows = job.run(target, config.workers, done)
    new = sum(count for _, count in computed)
    labels = Counter(labels_in(target))
    shares = {label: f"{count:,} ({count / rows:.1%})" for label, count in labels.most_common(20)}
    return dg.MaterializeResult(
        data_version=dg.DataVersion(job.place.name),
        metadata={
            "file": dg.MetadataValue.path(str(target)),
            "rows": rows,
            "answered_before": rows - new,
            **_speed(computed),
            "model": f"models:/{job.model.name}/{job.model.version}",
            "scale": job.model.scale,
            "weights": job.model.weights,
            "exact": job.model.exact,
            **({"labels": mapping_table(shares)} if shares else {}),
        },
    )


def _speed(computed: Sequence[tuple[float, int]]) -> dict[str, float]:
    """Rows per second since the first chunk was done, for before it processes start and load the model."""
    if len(computed) < _CHUNKS:
        return {}
    (first, begun), (last, _) = computed[0], computed[-1]
    return {"rows_per_second": (sum(rows for _, rows in computed) - begun) / max(1e-9, last - first)}


def predictions_jobs(entries: Sequence[Entry]) -> list[Any]:
    """For each workload `<name>_predictions`."""
    return [
        dg.define_asset_job(
            f"{entry.name}_predictions",
            dg.AssetSelection.assets(dg.AssetKey([entry.name, "predictions"])),
            description=f"Have the champion of {entry.name} answer the samples of a file",
        )
        for entry in entries
    ]


def inputs_sensor(entries: Sequence[Entry], jobs: Sequence[Any]) -> dg.SensorDefinition:
    """Has each file answered that is put into a workload's folder, as soon as it has stopped growing."""

    @dg.sensor(
        name="inputs_folder",
        jobs=list(jobs),
        minimum_interval_seconds=15,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=f"Has each file in ${FOLDER_VARIABLE}/<workload> answered that has stopped growing.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        if path_in(FOLDER_VARIABLE) is None:
            return dg.SkipReason(f"{FOLDER_VARIABLE} is not set")
        before = json.loads(context.cursor) if context.cursor else {}
        cursor, requests, additions = {}, [], []
        for entry in entries:
            if not (folder := _folder(entry.name)).is_dir():
                continue
            found, ready = settled(folder, SUFFIXES, before.get(entry.name, {}))
            cursor[entry.name] = found
            partitions = inputs_of(entry.name)
            known = set(context.instance.get_dynamic_partitions(str(partitions.name)))
            if new := [name for name in ready if name not in known]:
                additions.append(partitions.build_add_request(new))
            # A run's key holds for ever: a file is answered once, and again when it has changed.
            requests += [
                dg.RunRequest(
                    run_key=f"{entry.name}/{name}:{found[name][0]}:{found[name][1]}",
                    job_name=f"{entry.name}_predictions",
                    partition_key=name,
                )
                for name in ready
            ]
        return dg.SensorResult(run_requests=requests, dynamic_partitions_requests=additions, cursor=json.dumps(cursor))

    return sensor
