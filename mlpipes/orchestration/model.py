"""The assets `model`, `eval_report` and `champion`: export and registration, evaluation on test, promotion."""

import dagster as dg

from mlpipes.data.snapshot import Snapshot, open_snapshot
from mlpipes.errors import ConfigError
from mlpipes.evaluation.records import (
    NIGHT_TAG,
    Subject,
    evaluations_of,
    history_points,
    measured_on,
    open_evaluation,
    publish_evaluation,
)
from mlpipes.orchestration.metadata import mapping_table, picture, report_metadata, run_link
from mlpipes.orchestration.resources import MlflowResource, StoreResource
from mlpipes.reporting.model_card import model_card
from mlpipes.store.layout import TrainingFolder
from mlpipes.store.outcome import Outcome
from mlpipes.store.recipe import Recipe
from mlpipes.store.references import (
    ChampionReference,
    EvaluationReference,
    ModelReference,
    TrainingReference,
)
from mlpipes.workloads.catalog import Entry

SPLIT = "test"


def _open(store: StoreResource, reference: TrainingReference) -> tuple[TrainingFolder, Recipe, Snapshot, Outcome]:
    folder = store.store.training(reference.fingerprint)
    try:
        recipe, outcome = Recipe.read(folder.recipe), Outcome.read(folder.result)
        return folder, recipe, open_snapshot(store.store.snapshots / recipe.snapshot), outcome
    except FileNotFoundError as error:
        raise ConfigError(
            f"{error.filename or error} is gone from the store; materialize `checkpoints` again"
        ) from error


def materialize_model(
    context: dg.AssetExecutionContext,
    entry: Entry,
    reference: TrainingReference,
    store: StoreResource,
    mlflow: MlflowResource,
) -> dg.MaterializeResult:
    """Export the best checkpoint by validation, calibrate it there, write its card, register it."""
    from mlpipes.tracking.models import EXPORTED, FINGERPRINT, SCALE, SNAPSHOT, WEIGHTS, register, registered_name
    from mlpipes.training.model import calibrated_model, deployable, export_best

    folder, recipe, snapshot, outcome = _open(store, reference)
    trained = calibrated_model(export_best(folder, recipe, outcome), snapshot)
    calibration, exported = trained.calibration, trained.exported_digest
    if calibration is not None and calibration.note:
        context.log.warning(f"calibration: {calibration}")
    card = folder.path / "card.md"
    about = {"exported": exported} | ({"calibration": str(calibration)} if calibration is not None else {})
    card.write_text(model_card(entry.summary, recipe, snapshot, outcome, trained.meta | about), encoding="utf-8")
    tracker = mlflow.tracker()
    name = registered_name(entry.name)
    version = register(
        tracker,
        reference.mlflow_run_id,
        name,
        deployable(trained, snapshot),
        tags={
            FINGERPRINT: recipe.fingerprint,
            EXPORTED: exported,
            SCALE: recipe.scale.key,
            WEIGHTS: trained.meta["weights_digest"],
            SNAPSHOT: recipe.snapshot,
        },
        extra_files=[card],
        parameters=calibration.parameters if calibration is not None else {},
    )
    # Only now: until the version is there, what is evaluated is the one before.
    if calibration is not None:
        calibration.write_to(folder.calibration)
    else:
        folder.calibration.unlink(missing_ok=True)
    metric = trained.workload.metric.name
    return dg.MaterializeResult(
        value=ModelReference(**dict(reference), registered_model=name, version=version),
        data_version=dg.DataVersion(exported),
        metadata={
            "card": dg.MetadataValue.md(card.read_text(encoding="utf-8")),
            "registered_model": f"models:/{name}/{version}",
            # Not there in a model of when the workload had another metric.
            **{f"validation_{metric}": v for name, v in trained.meta["metrics"].items() if name == metric},
            "epoch": trained.meta["epoch"],
            "weights_digest": trained.meta["weights_digest"],
            "exported_digest": exported,
            "calibration": str(calibration or "none"),
            "folder": dg.MetadataValue.path(str(folder.model)),
            "mlflow": run_link(tracker, reference.mlflow_run_id),
        },
    )


def materialize_evaluation(
    context: dg.AssetExecutionContext,
    entry: Entry,
    reference: ModelReference,
    store: StoreResource,
    mlflow: MlflowResource,
) -> dg.MaterializeResult:
    """Evaluate the model on the test split; JSON, Markdown and pictures go to the store, MLflow and Dagster."""
    from mlpipes.reporting import figures
    from mlpipes.training.model import evaluate, load_model

    folder, recipe, snapshot, outcome = _open(store, reference)
    trained = load_model(folder.model, snapshot)
    report, scores = evaluate(trained, snapshot, SPLIT)
    subject = Subject(
        workload=entry.name,
        scale=recipe.scale.key,
        seed=recipe.seed,
        fingerprint=recipe.fingerprint,
        snapshot=snapshot.digest,
        rows={split: snapshot.rows(split) for split in ("validation", SPLIT)},
        weights=trained.meta["weights_digest"],
        split=SPLIT,
        n=snapshot.counts[SPLIT],
        data=snapshot.meta["provenance"]["fidelity"],
        night=context.run.tags.get(NIGHT_TAG),
        dagster_run_id=context.run.run_id,
    )
    title = f"{entry.name} {recipe.scale.key}: evaluation"
    evaluation = publish_evaluation(folder, report, scores, title, subject)
    tracker, run_id = mlflow.tracker(), reference.mlflow_run_id
    estimates = {f"{SPLIT}/{name}": estimate.value for name, estimate in report.estimates.items()}
    tracker.log_values(run_id, estimates, step=outcome.steps)
    tracker.log_files(run_id, f"evaluation/{evaluation.name}", sorted(evaluation.path.iterdir()))
    metric = trained.workload.metric.name
    history = evaluations_of(store.store, entry.name, recipe.scale.key)
    return dg.MaterializeResult(
        value=EvaluationReference(**dict(reference), evaluation=evaluation.name, estimates=evaluation.meta.estimates),
        data_version=dg.DataVersion(trained.exported_digest),
        metadata=report_metadata(report)
        | {
            "history": picture(
                figures.history(history_points(history, metric), metric), f"{metric} of each evaluation"
            ),
            "measured_on": mapping_table(measured_on(subject)),
            "report": dg.MetadataValue.path(str(evaluation.path / "report.md")),
            "mlflow": run_link(tracker, run_id),
        },
    )


def materialize_champion(
    context: dg.AssetExecutionContext,
    entry: Entry,
    reference: EvaluationReference,
    store: StoreResource,
    mlflow: MlflowResource,
) -> dg.MaterializeResult:
    """Make the model champion if it passed the gates and is better than the one that is."""
    from mlpipes.evaluation.promotion import Decision, decide
    from mlpipes.tracking.champion import Champions

    evaluation = open_evaluation(store.store, reference)
    verdict = evaluation.verdict
    if verdict is None or not verdict["passed"]:
        failed = [f"{n}: {g['text']}" for n, g in (verdict or {"gates": {}})["gates"].items() if not g["passed"]]
        why = "; ".join(failed) or "they were not asked: execute the checks of `eval_report`"
        raise ConfigError(f"the gates did not let {reference.registered_model} {reference.version} pass: {why}")
    champions = Champions(mlflow.tracker(), reference.registered_model)
    current = champions.current()
    if current is not None and current.version == reference.version:
        decision = Decision(False, "it is champion already, and still passes the gates")
    else:
        decision = decide(store.store, entry.load(), evaluation, current)
    if decision.promoted:
        champions.promote(reference.version, decision.reason)
    chosen = champions.current()
    assert chosen is not None  # noqa: S101 - promoted, or there before
    return dg.MaterializeResult(
        value=ChampionReference(**dict(reference), champion=chosen.version),
        metadata={
            "promoted": decision.promoted,
            "reason": decision.reason,
            "champion": f"models:/{champions.name}@champion, version {chosen.version} ({chosen.scale})",
            "evaluation": evaluation.name,
        },
    )
