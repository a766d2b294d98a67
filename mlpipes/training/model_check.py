"""Whether hyperparameters go with model and data: tried on the CPU before anything is started, in a second or so."""

import torch

from mlpipes.data.snapshot import Snapshot
from mlpipes.errors import ConfigError, UserError
from mlpipes.store.recipe import Recipe
from mlpipes.training.determinism import DataOrder, mixed_seed, random_numbers_from
from mlpipes.training.dry_run import faults_named
from mlpipes.training.gradient import ShardedGradient
from mlpipes.training.parallel import SingleWorker
from mlpipes.training.worker import known_cause
from mlpipes.workloads.base import DataInfo
from mlpipes.workloads.catalog import load_workload
from mlpipes.workloads.tensors import on_device


def check_model(recipe: Recipe, snapshot: Snapshot) -> None:
    """Build a training's model and optimizers, and have the smallest part of its first batch go through.

    The model is built on this machine anyway, when it is exported. Raises a UserError that names the workload for what
    cannot be built, and for what the model says of its hyperparameters. Other errors of the rows may be for want of the
    training's device, and are left to the dry run, which has it.
    """
    workload, seed = load_workload(recipe.implementation), mixed_seed(recipe.seed, "model")
    hp = workload.hyperparameters.model_validate(recipe.hyperparameters)
    columns, shards = snapshot.columns("train"), hp.logical_shards or recipe.scale.workers
    rows = len(next(iter(columns.values())))
    with random_numbers_from(seed), faults_named(workload, recipe.workload, known_cause):
        model = workload.build_model(hp, DataInfo(snapshot.facts, snapshot.meta["statistics"], snapshot.files))
        ShardedGradient(model, SingleWorker(), shards, hp.reduction)
        workload.optimizers(model, hp)
        hp = workload.stage(0.0, hp)
        try:
            batch = DataOrder(rows, recipe.scale.batch_size, recipe.seed, workload.lengths(columns)).batch(0, 0)
            moved = on_device(columns, torch.device("cpu"))
            parts = [part for shard in batch.tensor_split(shards) for part in workload.micro_batches(moved, shard, hp)]
            with torch.no_grad():
                workload.loss(model.train(), workload.batch(moved, min(parts, key=len), hp, augment=True), hp)
        except UserError:
            raise
        except Exception as error:
            if (cause := known_cause(error)) is not None:
                raise ConfigError(cause) from error
