"""The `model` and `eval_report` assets: export and registration of the best checkpoint, and its judgement on test."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg

from mlpipes.assets.metadata import link, mapping_table, report_metadata
from mlpipes.data.snapshot import Snapshot, open_snapshot
from mlpipes.errors import ConfigError
from mlpipes.files import canonical_json, publishing, read_record
from mlpipes.reporting.documents import model_card
from mlpipes.resources import MlflowResource, StoreResource
from mlpipes.store import TrainingFolder
from mlpipes.training.recipe import Recipe
from mlpipes.workloads.catalog import Entry

SPLIT = "test"


def _open(store: StoreResource, reference: dict[str, Any]) -> tuple[TrainingFolder, Recipe, Snapshot, dict[str, Any]]:
    folder = store.store.training(reference["fingerprint"])
    try:
        recipe, outcome = Recipe.model_validate(read_record(folder.recipe)), read_record(folder.result)
        return folder, recipe, open_snapshot(store.store.snapshots / recipe.snapshot), outcome
    except FileNotFoundError as error:
        raise ConfigError(
            f"{error.filename or error} is gone from the store; materialize `checkpoints` again"
        ) from error


def materialize_model(
    context: dg.AssetExecutionContext,
    entry: Entry,
    reference: dict[str, Any],
    store: StoreResource,
    mlflow: MlflowResource,
) -> dg.MaterializeResult:
    """Export the best checkpoint by validation, write its card, register it."""
    from mlpipes.tracking.models import FINGERPRINT, register
    from mlpipes.training.export import deployable, export_best, load_model

    folder, recipe, snapshot, outcome = _open(store, reference)
    trained = load_model(export_best(folder, recipe, outcome), snapshot)
    card = folder.path / "card.md"
    card.write_text(model_card(entry.summary, recipe, snapshot, outcome, trained.meta), encoding="utf-8")
    tracker = mlflow.tracker()
    name = f"mlpipes-{entry.name}"
    version = register(
        tracker,
        reference["mlflow_run_id"],
        name,
        deployable(trained, snapshot),
        tags={
            FINGERPRINT: recipe.fingerprint,
            "mlpipes.scale": recipe.scale.key,
            "mlpipes.weights_digest": trained.meta["weights_digest"],
            "mlpipes.snapshot": recipe.snapshot,
        },
        extra_files=[card],
    )
    metric = trained.workload.primary_metric
    return dg.MaterializeResult(
        value={**reference, "registered_model": name, "version": version},
        data_version=dg.DataVersion(trained.meta["weights_digest"]),
        metadata={
            "card": dg.MetadataValue.md(card.read_text(encoding="utf-8")),
            "registered_model": f"models:/{name}/{version}",
            f"validation_{metric}": trained.meta["metrics"][metric],
            "epoch": trained.meta["epoch"],
            "weights_digest": trained.meta["weights_digest"],
            "folder": dg.MetadataValue.path(str(folder.model)),
            "mlflow": link(tracker.link(reference["mlflow_run_id"]), tracker.command(reference["mlflow_run_id"])),
        },
    )


def materialize_evaluation(
    context: dg.AssetExecutionContext,
    entry: Entry,
    reference: dict[str, Any],
    store: StoreResource,
    mlflow: MlflowResource,
) -> dg.MaterializeResult:
    """Judge the model on the test split; JSON, Markdown and pictures go to the store, MLflow and Dagster."""
    from mlpipes.training.export import evaluate, load_model

    folder, recipe, snapshot, outcome = _open(store, reference)
    trained = load_model(folder.model, snapshot)
    report = evaluate(trained, snapshot, SPLIT)
    measured_on = {
        "split": SPLIT,
        "n": f"{snapshot.counts[SPLIT]:,}",
        "data": snapshot.meta["provenance"]["fidelity"],
        "snapshot": snapshot.digest[:12],
        "scale": recipe.scale.key,
        "seed": recipe.seed,
        "weights": trained.meta["weights_digest"][:12],
    }
    target = folder.evaluation(f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{context.run.run_id[:8]}")
    markdown = report.markdown(f"{entry.name} {recipe.scale.key}: evaluation", measured_on)
    with publishing(target, kind="evaluation", version=1) as draft:
        (draft.path / "report.json").write_bytes(canonical_json(report.as_dict() | {"measured_on": measured_on}))
        (draft.path / "report.md").write_text(markdown, encoding="utf-8")
        for name, png in report.figures.items():
            (draft.path / f"{name}.png").write_bytes(png)
        draft.meta.update(measured_on=measured_on, fingerprint=recipe.fingerprint, dagster_run_id=context.run.run_id)
    tracker, run_id = mlflow.tracker(), reference["mlflow_run_id"]
    estimates = {f"{SPLIT}/{name}": estimate.value for name, estimate in report.estimates.items()}
    tracker.log_values(run_id, estimates, step=outcome["steps"])
    tracker.log_files(run_id, f"evaluation/{target.name}", sorted(Path(target).iterdir()))
    return dg.MaterializeResult(
        value={**reference, "evaluation": target.name, "estimates": report.as_dict()["estimates"]},
        data_version=dg.DataVersion(trained.meta["weights_digest"]),
        metadata=report_metadata(report)
        | {
            "measured_on": mapping_table(measured_on),
            "report": dg.MetadataValue.path(str(target / "report.md")),
            "mlflow": link(tracker.link(run_id), tracker.command(run_id)),
        },
    )
