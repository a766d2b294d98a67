"""The `checkpoints` asset: a training submitted as a Ray job, or found again, and followed to its end."""

import os
import time
from typing import Any

import dagster as dg
from pydantic import Field, ValidationError

from mlpipes.compute.jobs import ALIVE, Jobs
from mlpipes.data.snapshot import open_snapshot
from mlpipes.errors import ConfigError, CorruptionError, PreflightError, TrainingFailedError, UserError
from mlpipes.orchestration.following import follow_training, is_cancelled
from mlpipes.orchestration.metadata import mapping_table, picture, run_link
from mlpipes.orchestration.resources import MlflowResource, RayResource, StoreResource
from mlpipes.settings import problems
from mlpipes.store.files import quarantine
from mlpipes.store.layout import TrainingFolder
from mlpipes.store.outcome import Outcome
from mlpipes.store.recipe import Recipe
from mlpipes.store.references import SnapshotReference, TrainingReference
from mlpipes.store.training_job import Checkpointing, Tracking, TrainingJob
from mlpipes.training.code_version import code_version
from mlpipes.workloads.catalog import Entry

DAGSTER_UI_VARIABLE = "MLPIPES_DAGSTER_UI"


class TrainingConfig(dg.Config):
    """What can be set when a training is launched."""

    seed: int = Field(
        default=0, description="seed of initialization, data order and augmentation; part of the fingerprint"
    )
    hyperparameters: dict[str, Any] = Field(
        {}, description="changes to the workload's defaults, e.g. network: resnet18"
    )
    fresh: bool = Field(default=False, description="train again from the beginning, beside what is there")
    checkpoint_every_seconds: float = Field(
        default=60.0, gt=0, allow_inf_nan=False, description="besides the checkpoint at the end of each epoch"
    )
    mean_seconds_between_failures: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="of the whole training; the interval of checkpoints then follows from what one is measured to cost",
    )
    stall_seconds: float = Field(
        default=900.0, gt=0, allow_inf_nan=False, description="silence after which a training is started again"
    )
    keep_last: int = Field(default=2, ge=1, description="checkpoints kept besides the best")
    min_workers: int | None = Field(
        default=None,
        ge=1,
        description="elastic: start, and continue, with as few workers as this; the model stays the same",
    )
    resize_seconds: float = Field(
        default=60.0, gt=0, allow_inf_nan=False, description="how often an elastic training looks for more workers"
    )


def make_recipe(entry: Entry, partition: str, snapshot_digest: str, config: TrainingConfig, generation: str) -> Recipe:
    """The recipe of a training. Raises ConfigError naming the hyperparameter that is unknown or out of range."""
    workload = entry.load()
    try:
        hyperparameters = workload.hyperparameters.model_validate(config.hyperparameters)
    except ValidationError as error:
        said = problems(error, workload.hyperparameters.model_fields)
        raise ConfigError(f"hyperparameters of {entry.name}: {said}") from error
    return Recipe(
        workload=entry.name,
        implementation=entry.implementation,
        snapshot=snapshot_digest,
        scale=entry.scale(partition),
        hyperparameters=hyperparameters.model_dump(mode="json"),
        seed=config.seed,
        code=code_version(entry.implementation),
        generation=generation if config.fresh else "",
    )


def finished(folder: TrainingFolder) -> Outcome | None:
    """The outcome of a training that has one; a corrupt record is quarantined, and rebuilt from the checkpoints."""
    try:
        return Outcome.read(folder.result)
    except FileNotFoundError:
        return None
    except CorruptionError:
        quarantine(folder.result)
        return None


def materialize_training(
    context: dg.AssetExecutionContext,
    entry: Entry,
    snapshot_reference: SnapshotReference,
    config: TrainingConfig,
    store: StoreResource,
    ray: RayResource,
    mlflow: MlflowResource,
) -> dg.MaterializeResult:
    """Train the partition's scale, or attach to the training that runs, or find that it has finished."""
    from mlpipes.compute import preflight
    from mlpipes.training.checkpoints import Checkpoints
    from mlpipes.training.model_check import check_model

    started = time.monotonic()
    snapshot = open_snapshot(store.store.snapshots / snapshot_reference.digest)
    # Retries of a fresh start resume it, so it is named after the first run of the family.
    root_run = context.run.tags.get("dagster/root_run_id") or context.run.root_run_id or context.run.run_id
    recipe = make_recipe(entry, context.partition_key, snapshot.digest, config, generation=root_run)
    folder = store.store.training(recipe.fingerprint)
    preflight.check_shards(
        recipe.scale, recipe.hyperparameters["logical_shards"] or recipe.scale.workers, snapshot.counts["train"]
    )
    preflight.check_elastic(recipe.scale, config.min_workers, recipe.hyperparameters["reduction"])
    outcome = finished(folder)
    if outcome is None:  # before anything is written: what does not fit leaves no trace
        if not Checkpoints(folder.checkpoints).steps():
            check_model(recipe, snapshot)
        preflight.check_disk(store.store.root)
        _check_place(context, ray.jobs(recipe.scale), _job(context, store, recipe, config), snapshot.published.size)
    recipe.write_to(folder.recipe)
    tracker = mlflow.tracker()
    run_id = tracker.run_of(
        f"mlpipes/{entry.name}",
        recipe.fingerprint,
        name=f"{recipe.scale.key}-seed{recipe.seed}",
        parameters={**recipe.scale.model_dump(), **recipe.hyperparameters, "seed": recipe.seed},
        tags=_tags(context, entry, recipe),
    )
    mlflow_link = run_link(tracker, run_id)
    if outcome is None:
        # At once, so that the links are there while it trains.
        metadata = {"mlflow": mlflow_link, "fingerprint": recipe.fingerprint}
        partition = context.partition_key
        context.log_event(dg.AssetObservation(context.asset_key, partition=partition, metadata=metadata))
        try:
            follow_training(
                context,
                lambda: ray.jobs(recipe.scale),
                _job(context, store, recipe, config, Tracking(uri=tracker.uri, run_id=run_id)),
                config.stall_seconds,
                {"mlflow": mlflow_link},
            )
        except BaseException as error:
            # An interruption that nobody asked for leaves the run RUNNING in MLflow, as the training is.
            if isinstance(error, UserError) or is_cancelled(context):
                tracker.set_status(run_id, "FAILED" if isinstance(error, UserError) else "KILLED")
            raise
        outcome = finished(folder)
        if outcome is None:
            raise TrainingFailedError(f"the training {recipe.fingerprint} ended, but {folder.result} is not there")
    else:
        context.log.info(f"Training {recipe.fingerprint} has finished before; nothing to do.")
    # The driver may have died between the last checkpoint and the last request to MLflow; a row sent twice stays single.
    tracker.log_history(run_id, outcome.history)
    tracker.log_values(run_id, {"train/seconds": outcome.train_seconds}, step=outcome.steps)
    tracker.set_status(run_id, "FINISHED")
    return dg.MaterializeResult(
        value=TrainingReference(fingerprint=recipe.fingerprint, mlflow_run_id=run_id, snapshot=snapshot.digest),
        data_version=dg.DataVersion(outcome.weights_digest),
        metadata=_metadata(entry, recipe, outcome, folder)
        | {"mlflow": mlflow_link, "step_seconds": time.monotonic() - started},
    )


def _job(
    context: dg.AssetExecutionContext,
    store: StoreResource,
    recipe: Recipe,
    config: TrainingConfig,
    tracking: Tracking | None = None,
) -> TrainingJob:
    return TrainingJob(
        recipe=recipe,
        store=str(store.store.root),
        attempt=1,
        checkpointing=Checkpointing(
            every_seconds=config.checkpoint_every_seconds,
            mean_seconds_between_failures=config.mean_seconds_between_failures,
            keep_last=config.keep_last,
        ),
        tracking=tracking,
        min_workers=config.min_workers,
        resize_seconds=config.resize_seconds,
        requested_by=context.run.run_id,
    )


def _check_place(context: dg.AssetExecutionContext, jobs: Jobs, job: TrainingJob, data_bytes: int) -> None:
    """Raises PreflightError if the place cannot hold a training that is not under way there.

    One that is goes on, whatever has become of queues, quotas and nodes since: it is there to be attached to.
    """
    scale = job.recipe.scale
    try:
        jobs.check(scale, data_bytes, job.min_workers)
    except PreflightError as error:
        if not any(job.folder.specification(0).parent.glob("a*.json")):
            raise
        latest = jobs.latest(jobs.name_of(job))  # patient, unlike the check
        if latest is None or latest[1].state not in ALIVE:
            jobs.check(scale, data_bytes, job.min_workers)
        else:
            context.log.warning(f"{jobs.name} {latest[0].id} is under way all the same: {error}")


def _tags(context: dg.AssetExecutionContext, entry: Entry, recipe: Recipe) -> dict[str, str]:
    """What leads from the MLflow run back to Dagster; the note is what MLflow's UI shows as its description."""
    run_id = context.run.run_id
    tags = {
        "mlpipes.workload": entry.name,
        "mlpipes.scale": recipe.scale.key,
        "mlpipes.snapshot": recipe.snapshot,
        "mlpipes.code": recipe.code,
        "dagster.run_id": run_id,
        "dagster.partition": context.partition_key,
    }
    if base := os.environ.get(DAGSTER_UI_VARIABLE):
        tags["mlflow.note.content"] = f"Dagster run [{run_id}]({base}/runs/{run_id}), asset {entry.name}/checkpoints"
    return tags


def _metadata(entry: Entry, recipe: Recipe, outcome: Outcome, folder: TrainingFolder) -> dict[str, Any]:
    from mlpipes.reporting import figures
    from mlpipes.training.checkpoints import chosen_weights  # not before: it imports torch

    best, metric = outcome.best, entry.load().metric.name
    curves = figures.training_curves(outcome.history, outcome.steps_per_epoch, best.step, metric)
    return {
        "curves": picture(curves, "loss and validation curves"),
        f"validation_{metric}": best.metrics[metric],
        "best_epoch": best.epoch,
        "train_seconds": outcome.train_seconds,
        "samples_per_second": outcome.samples_per_second,
        "precision": outcome.precision,
        "steps": outcome.steps,
        "parameters": outcome.parameters,
        # As in reports, history and comparisons; replays look at the last step's.
        "weights_digest": chosen_weights(folder.checkpoints, outcome) or "its checkpoint cannot be read",
        "last_step_weights_digest": outcome.weights_digest,
        "fingerprint": recipe.fingerprint,
        "folder": dg.MetadataValue.path(str(folder.path)),
        "environment": mapping_table(outcome.environment),
        "recipe": dg.MetadataValue.json(recipe.model_dump(mode="json")),
    }
