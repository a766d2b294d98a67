"""The `checkpoints` asset: a training submitted as a Ray job, or found again, and followed to its end."""

import shlex
import sys
import time
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field, ValidationError

from mlpipes.assets.metadata import link, mapping_table, picture
from mlpipes.data.snapshot import open_snapshot
from mlpipes.errors import ConfigError, CorruptionError, TrainingFailedError
from mlpipes.files import read_record, set_aside, write_record
from mlpipes.resources import MlflowResource, RayResource, StoreResource
from mlpipes.store import TrainingFolder
from mlpipes.training.recipe import Recipe, code_version
from mlpipes.training.specification import Checkpointing, Tracking, TrainingJob
from mlpipes.workloads.catalog import Entry

OBSERVATION_SECONDS = 5.0


class TrainingConfig(dg.Config):
    """What can be set when a training is launched."""

    seed: int = Field(0, description="seed of initialization, data order and augmentation; part of the fingerprint")
    hyperparameters: dict[str, Any] = Field(
        {}, description="changes to the workload's defaults, e.g. network: resnet18"
    )
    fresh: bool = Field(False, description="train again from the beginning, beside what is there")
    checkpoint_every_seconds: float = Field(60.0, gt=0, description="besides the checkpoint at the end of each epoch")
    keep_last: int = Field(2, ge=1, description="checkpoints kept besides the best")


def make_recipe(entry: Entry, partition: str, snapshot_digest: str, config: TrainingConfig, generation: str) -> Recipe:
    """The recipe of a training. Raises ConfigError naming the hyperparameter that is unknown or out of range."""
    workload = entry.load()
    try:
        hyperparameters = workload.hyperparameters.model_validate(config.hyperparameters)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']} (got {p['input']!r})" for p in error.errors())
        known = ", ".join(workload.hyperparameters.model_fields)
        raise ConfigError(f"hyperparameters of {entry.name}: {problems}. Known: {known}.") from error
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


def finished(folder: TrainingFolder) -> dict[str, Any] | None:
    """The outcome of a training that has one; a corrupt record is set aside, for the checkpoints can make it again."""
    try:
        return read_record(folder.result)
    except FileNotFoundError:
        return None
    except CorruptionError:
        set_aside(folder.result)
        return None


def materialize_training(
    context: dg.AssetExecutionContext,
    entry: Entry,
    snapshot_reference: dict[str, Any],
    config: TrainingConfig,
    store: StoreResource,
    ray: RayResource,
    mlflow: MlflowResource,
) -> dg.MaterializeResult:
    """Train the partition's scale, or attach to the training that runs, or find that it has finished."""
    from mlpipes.compute import preflight

    started = time.monotonic()
    snapshot = open_snapshot(store.store.snapshots / snapshot_reference["digest"])
    # Retries of a fresh start go on with it, so it is named after the first run of the family.
    root_run = context.run.tags.get("dagster/root_run_id", context.run_id)
    recipe = make_recipe(entry, context.partition_key, snapshot.digest, config, generation=root_run)
    folder = store.store.training(recipe.fingerprint)
    preflight.check_shards(recipe.scale, recipe.hyperparameters["logical_shards"], snapshot.counts["train"])
    write_record(folder.recipe, recipe.model_dump(mode="json"))
    tracker = mlflow.tracker()
    run_id = tracker.run_of(
        f"mlpipes/{entry.name}",
        recipe.fingerprint,
        name=f"{recipe.scale.key}-seed{recipe.seed}",
        parameters={**recipe.scale.model_dump(), **recipe.hyperparameters, "seed": recipe.seed},
        tags={
            "mlpipes.workload": entry.name,
            "mlpipes.scale": recipe.scale.key,
            "mlpipes.snapshot": snapshot.digest,
            "mlpipes.code": recipe.code,
            "dagster.run_id": context.run_id,
            "dagster.partition": context.partition_key,
        },
    )
    mlflow_link = link(tracker.link(run_id), f"mlflow ui --backend-store-uri {tracker.uri}  # run {run_id}")
    outcome = finished(folder)
    if outcome is None:
        address = ray.connect()
        preflight.check_cluster(recipe.scale, preflight.nodes_of(address), snapshot.published.size)
        preflight.check_disk(store.store.root)
        context.log_event(
            dg.AssetObservation(
                context.asset_key,
                partition=context.partition_key,
                metadata={"mlflow": mlflow_link, "fingerprint": recipe.fingerprint, "ray": address.dashboard},
            )
        )
        try:
            _follow(context, address, recipe, folder, config, store, Tracking(uri=tracker.uri, run_id=run_id))
        except TrainingFailedError:
            tracker.set_status(run_id, "FAILED")
            raise
        outcome = finished(folder)
        if outcome is None:
            raise TrainingFailedError(f"the training {recipe.fingerprint} ended, but {folder.result} is not there")
    else:
        context.log.info(f"Training {recipe.fingerprint} has finished before; nothing to do.")
    # The driver may have died between the last checkpoint and the last request to MLflow; a row sent twice stays single.
    tracker.log_history(run_id, outcome["history"])
    tracker.log_values(run_id, {"train/seconds": outcome["train_seconds"]}, step=outcome["steps"])
    tracker.set_status(run_id, "FINISHED")
    reference = {"fingerprint": recipe.fingerprint, "mlflow_run_id": run_id, "snapshot": snapshot.digest}
    return dg.MaterializeResult(
        value=reference,
        data_version=dg.DataVersion(outcome["weights_digest"]),
        metadata=_metadata(entry, recipe, outcome, folder)
        | {"mlflow": mlflow_link, "step_seconds": time.monotonic() - started},
    )


def _follow(
    context: dg.AssetExecutionContext,
    address: Any,
    recipe: Recipe,
    folder: TrainingFolder,
    config: TrainingConfig,
    store: StoreResource,
    tracking: Tracking,
) -> None:
    from mlpipes.compute.jobs import RayJobs

    jobs = RayJobs(address)
    checkpointing = Checkpointing(every_seconds=config.checkpoint_every_seconds, keep_last=config.keep_last)

    def entrypoint(attempt: int) -> str:
        job = TrainingJob(
            recipe=recipe,
            store=str(store.store.root),
            attempt=attempt,
            checkpointing=checkpointing,
            tracking=tracking,
        )
        python = sys.executable if address.local else "python"
        # exec: without it a shell stands between Ray and the driver, and the driver survives the head's death.
        return shlex.join(["exec", python, "-m", "mlpipes.training.job", str(job.write())])

    earlier = [int(path.stem[1:]) for path in folder.messages(0).parent.glob("a*.jsonl")]
    environment = {
        "MLPIPES_HOME": str(store.store.root.parent),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONUNBUFFERED": "1",
    }
    if address.local:
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    handle = jobs.attach_or_submit(
        recipe.fingerprint,
        max(earlier, default=0) + 1,
        entrypoint,
        environment,
        metadata={"workload": recipe.workload, "scale": recipe.scale.key, "dagster_run_id": context.run_id},
    )
    context.log.info(f"{'Attached to' if handle.attached else 'Submitted'} Ray job {handle.submission_id}")
    status, failure, shown = "", None, 0.0
    try:
        for message in jobs.follow(handle, folder.messages(handle.attempt)):
            kind = message["kind"]
            if kind == "progress" and time.monotonic() - shown >= OBSERVATION_SECONDS:
                shown = time.monotonic()
                _observe(context, message)
            elif kind == "epoch":
                figures = ", ".join(f"{name} {value:.4f}" for name, value in message["metrics"].items())
                context.log.info(f"epoch {message['epoch']}/{message['epochs']}: validation {figures}")
            elif kind in ("started", "resumed"):
                context.log.info(f"{kind} at step {message['step']} of {message['total_steps']}")
            elif kind == "warning":
                context.log.warning(message["text"])
            elif kind == "failed":
                failure = message["error"]
                break
            elif kind == "finished" and folder.result.is_file():
                # The outcome is in the store; how long the driver takes to clean up after itself does not matter.
                return
            elif kind == "ended":
                status = message["status"]
    except BaseException:
        # A cancelled run ends its training. Any other interruption (the code server goes away, say) leaves it running:
        # the next attempt attaches to it.
        run = context.instance.get_run_by_id(context.run_id)
        if run is not None and run.status in (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED):
            jobs.stop(handle.submission_id)
        raise
    if failure is not None:
        jobs.stop(handle.submission_id)
        raise TrainingFailedError(f"{failure} (Ray job {handle.submission_id})")
    if not folder.result.is_file():
        tail = "" if status == "LOST" else jobs.logs(handle.submission_id)[-3000:]
        raise TrainingFailedError(
            f"Ray job {handle.submission_id} ended as {status} without a result. Its log ends:\n{tail}"
        )


def _observe(context: dg.AssetExecutionContext, message: dict[str, Any]) -> None:
    context.log_event(
        dg.AssetObservation(
            context.asset_key,
            partition=context.partition_key,
            description=f"step {message['step']} of {message['total_steps']}",
            metadata={
                "epoch": message["epoch"],
                "loss": message["loss"],
                "samples_per_second": message["samples_per_second"],
                "eta_seconds": message["eta_seconds"],
            },
        )
    )


def _metadata(entry: Entry, recipe: Recipe, outcome: dict[str, Any], folder: TrainingFolder) -> dict[str, Any]:
    from mlpipes.reporting import figures

    best, metric = outcome["best"], entry.load().primary_metric
    curves = figures.training_curves(outcome["history"], outcome["steps_per_epoch"], best["step"], metric)
    return {
        "curves": picture(curves, "loss and validation curves"),
        f"validation_{metric}": best["metrics"][metric],
        "best_epoch": best["epoch"],
        "train_seconds": outcome["train_seconds"],
        "samples_per_second": outcome["samples_per_second"],
        "precision": outcome["precision"],
        "steps": outcome["steps"],
        "parameters": outcome["parameters"],
        "weights_digest": outcome["weights_digest"],
        "fingerprint": recipe.fingerprint,
        "folder": dg.MetadataValue.path(str(folder.path)),
        "environment": mapping_table(outcome["environment"]),
        "recipe": dg.MetadataValue.json(recipe.model_dump(mode="json")),
    }
