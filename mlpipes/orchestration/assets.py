"""The assets of a workload, partitioned by its Ray scales: dataset, snapshot, checkpoints, model, eval_report, champion."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import dagster as dg

from mlpipes.compute.places import has_queue
from mlpipes.orchestration.database import outlives_database
from mlpipes.orchestration.live import live_asset
from mlpipes.orchestration.loaded import drop, keep, take
from mlpipes.orchestration.metadata import mapping_table, user_errors
from mlpipes.orchestration.model import materialize_champion, materialize_evaluation, materialize_model
from mlpipes.orchestration.resources import MlflowResource, RayResource, StoreResource
from mlpipes.orchestration.scaling_report import scaling_report_asset
from mlpipes.orchestration.training import TrainingConfig, materialize_training
from mlpipes.store.references import (
    DatasetReference,
    EvaluationReference,
    ModelReference,
    Reference,
    SnapshotReference,
    TrainingReference,
)
from mlpipes.training.code_version import code_version, export_version, preparation_version
from mlpipes.workloads.catalog import Entry

OWNERS = ["team:ml-platform"]
TRAINING_POOL = "training"
"""Not used where the place has a queue of its own: that decides how many train at once, and a slot held while a job waits
in it helps nobody."""
EVALUATION_POOL = "evaluation"
PROMOTION_POOL = "promotion"
"""One at a time: two scales that finish together must not both compare with the same champion."""


def partitions_of(entry: Entry) -> dg.StaticPartitionsDefinition:
    """One partition a scale."""
    return dg.StaticPartitionsDefinition([scale.key for scale in entry.scales])


def workload_assets(entry: Entry) -> Sequence[dg.AssetsDefinition | dg.AssetSpec]:
    """The asset chain of one workload, its report over all scales, and its live view."""
    partitions, preparing = partitions_of(entry), preparation_version(entry.implementation)

    def common(name: str, description: str, kinds: set[str]) -> dict[str, Any]:
        return {
            "key": [entry.name, name],
            "group_name": entry.name,
            "partitions_def": partitions,
            "owners": OWNERS,
            "kinds": kinds,
            "tags": {"workload": entry.name},
            "description": description,
        }

    def upstream(name: str) -> dg.AssetIn:
        return dg.AssetIn(key=[entry.name, name])

    @dg.asset(
        **common("dataset", f"{entry.summary}: the source, verified, with licence and fidelity.", {"python"}),
        code_version=preparing,
    )
    def dataset(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        from mlpipes.data.dataset import dropped_rows, dropped_warning

        with user_errors():
            # A tag by hand, or a run from before the scale was dropped: what Dagster says of it later names no remedy.
            entry.scale(context.partition_key)
            source = entry.load().source
            loaded = source.load()
        digest, left_out = loaded.digest(), dropped_rows(loaded)
        if warning := dropped_warning(loaded):
            context.log.warning(warning)
        keep(entry.name, digest, loaded, source)
        return dg.MaterializeResult(
            value=DatasetReference(digest=digest, provenance=loaded.provenance.as_dict(), counts=loaded.counts),
            data_version=dg.DataVersion(digest),
            metadata={
                "provenance": mapping_table(loaded.provenance.as_dict()),
                "counts": mapping_table(loaded.counts),
                "digest": digest,
                **({"left_out": mapping_table(left_out)} if left_out else {}),
                **({"warning": warning} if warning else {}),
            },
        )

    @dg.asset(
        **common(
            "snapshot",
            "The data set split (disjoint by content, stratified, seeded) and stored under its digest; scales that need "
            "the same data share the bytes.",
            {"numpy"},
        ),
        ins={"source": upstream("dataset")},
        code_version=preparing,
    )
    def snapshot(
        context: dg.AssetExecutionContext, source: DatasetReference, store: StoreResource
    ) -> dg.MaterializeResult:
        from mlpipes.data.snapshot import snapshot_of, warnings_of

        loaded = take(entry.name, source.digest)
        with user_errors():
            made, warnings = snapshot_of(store.store, source.digest, entry.load(), preparing, loaded)
        del loaded  # it may be most of the memory
        for warning in (*warnings, *warnings_of(made)):
            context.log.warning(warning)
        return dg.MaterializeResult(
            value=SnapshotReference(digest=made.digest),
            data_version=dg.DataVersion(made.digest),
            metadata={
                "digest": made.digest,
                "counts": mapping_table(made.counts),
                "duplicates": mapping_table(made.meta["duplicates"]),
                "split_plan": dg.MetadataValue.json(made.meta["plan"]),
                "provenance": mapping_table(made.meta["provenance"]),
                "bytes": made.published.size,
                "folder": dg.MetadataValue.path(str(made.path)),
                "quarantine": len(warnings),
            },
        )

    @dg.asset(
        **common(
            "checkpoints",
            "The training on Ray: exactly resumable, found again by its fingerprint. Materialized when it has finished.",
            {"ray", "pytorch"},
        ),
        ins={"snapshot": upstream("snapshot")},
        code_version=code_version(entry.implementation),
        pool=None if has_queue() else TRAINING_POOL,
    )
    def checkpoints(
        context: dg.AssetExecutionContext,
        snapshot: SnapshotReference,
        config: TrainingConfig,
        store: StoreResource,
        ray: RayResource,
        mlflow: MlflowResource,
    ) -> dg.MaterializeResult:
        drop()
        with user_errors(), outlives_database(context):
            return materialize_training(context, entry, snapshot, config, store, ray, mlflow)

    def made_of(
        source: type[Reference],
        make: Callable[..., dg.MaterializeResult],
        pool: str | None = None,
        code: str | None = None,
        **about: Any,
    ) -> dg.AssetsDefinition:
        """An asset made of the one before it, by what that points to in the store and in MLflow."""

        @dg.asset(**common(**about), ins={"source": upstream(source.asset)}, pool=pool, code_version=code)
        def asset(
            context: dg.AssetExecutionContext, source: Any, store: StoreResource, mlflow: MlflowResource
        ) -> dg.MaterializeResult:
            with user_errors():
                return make(context, entry, source, store, mlflow)

        return cast("dg.AssetsDefinition", asset)

    model = made_of(
        TrainingReference,
        materialize_model,
        code=export_version(entry.implementation),
        name="model",
        description="The best checkpoint by validation (never by test), calibrated there, exported, registered in MLflow, "
        "with its card.",
        kinds={"pytorch", "mlflow"},
    )
    eval_report = made_of(
        ModelReference,
        materialize_evaluation,
        EVALUATION_POOL,
        name="eval_report",
        description="The model on the held-out test split: estimates with 95 % intervals, pictures, mistakes.",
        kinds={"scikitlearn", "mlflow"},
    )
    champion = made_of(
        EvaluationReference,
        materialize_champion,
        PROMOTION_POOL,
        name="champion",
        description="The best model by validation of all scales that passed the gates has the MLflow alias `champion`; "
        "decides whether this scale's model takes it, and says why.",
        kinds={"mlflow"},
    )
    chain = [dataset, snapshot, checkpoints, model, eval_report, champion]
    live = dg.AssetSpec(
        live_asset(entry.name),
        group_name=entry.name,
        owners=OWNERS,
        kinds={"ray"},
        description="Live curves (*Metadata*, *Plots*) and the state of all trainings, observed while they run.",
    )
    return [*cast("list[dg.AssetsDefinition]", chain), scaling_report_asset(entry, OWNERS), live]
