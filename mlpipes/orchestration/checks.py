"""Asset checks: what must hold for a partition besides its figures. Blocking ones stop what comes after them."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
from pydantic import Field

from mlpipes.errors import CorruptionError
from mlpipes.evaluation import gates
from mlpipes.orchestration.metadata import mapping_table, user_errors
from mlpipes.orchestration.resources import MlflowResource, RayResource, StoreResource, materialized
from mlpipes.store.outcome import Outcome
from mlpipes.store.references import EvaluationReference, SnapshotReference, TrainingReference
from mlpipes.workloads.catalog import Entry

REPLAY = "replay"
SERVED_DRIFT = "served_drift"
Partitions = dg.PartitionsDefinition[Any]


class ReplayConfig(dg.Config):
    """Whether the check runs: it costs another training."""

    enabled: bool = Field(default=False, description="train a second time elsewhere, and compare bit for bit")


class GateConfig(dg.Config):
    """Where the gates stand."""

    floor: float | None = Field(
        default=None,
        description="least value of the metric (the greatest where lower is better); default: its interval must be better "
        "than blind guessing",
    )
    significance: float = Field(
        default=0.01, gt=0, lt=1, description="probability below which chance does not explain a difference"
    )
    calibration_error: float = Field(
        default=0.1, ge=0, le=1, description="greatest expected calibration error (warning)"
    )


class DriftConfig(dg.Config):
    """When what is served counts as otherwise than what was evaluated."""

    hours: float = Field(default=24, gt=0, le=48, description="how far to look back; no more than 48 are kept")
    significance: float = Field(default=0.01, gt=0, lt=1, description="probability of a false alarm")
    least_effect: float = Field(default=0.1, ge=0, le=1, description="smaller differences of distributions are none")
    least_samples: int = Field(default=100, ge=1, description="of fewer, nothing is said")


def partition_checks(
    asset: dg.AssetKey, partitions: Partitions, descriptions: dict[str, str], blocking: Sequence[str] = ()
) -> Any:
    """The decorator of checks of one partition that are made together; each may also decide to say nothing.

    Checks with partitions are in preview: the one place that uses that API, and keeps its warning quiet, is here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)
        specs = [
            dg.AssetCheckSpec(n, asset=asset, description=d, partitions_def=partitions, blocking=n in blocking)
            for n, d in descriptions.items()
        ]

    def decorate(function: Callable[..., Any]) -> dg.AssetChecksDefinition:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dg.PreviewWarning)
            name = "__".join([*asset.path, specs[0].name if len(specs) == 1 else "checks"])
            return dg.multi_asset_check(name=name, specs=specs, can_subset=True)(function)

    return decorate


def workload_checks(entry: Entry, partitions: Partitions) -> list[dg.AssetChecksDefinition]:
    """All checks of a workload."""
    return [
        _snapshot_checks(entry, partitions),
        _loss_check(entry, partitions),
        _replay_check(entry, partitions),
        _gates(entry, partitions),
        _served_drift_check(entry, partitions),
    ]


def _snapshot_checks(entry: Entry, partitions: Partitions) -> dg.AssetChecksDefinition:
    asset = dg.AssetKey([entry.name, "snapshot"])
    descriptions = {
        "integrity": "Every byte of the snapshot is as it was written.",
        "no_leak": "No sample is in two splits, compared by content.",
    }

    @partition_checks(asset, partitions, descriptions, blocking=tuple(descriptions))
    def check(context: dg.AssetCheckExecutionContext, store: StoreResource) -> Iterator[dg.AssetCheckResult]:
        from mlpipes.data.snapshot import open_snapshot, shared_between_splits

        with user_errors():
            reference = materialized(SnapshotReference, store.store, entry.name, context.partition_key)
            path = store.store.snapshots / reference.digest
            selected = {key.name for key in context.selected_asset_check_keys}
            try:
                snapshot = open_snapshot(path)
            except CorruptionError as error:
                for name in selected:
                    yield dg.AssetCheckResult(
                        passed=False, asset_key=asset, check_name=name, metadata={"finding": str(error)}
                    )
                return
            if "integrity" in selected:
                metadata = {"files": len(snapshot.published.files), "bytes": snapshot.published.size}
                yield dg.AssetCheckResult(passed=True, asset_key=asset, check_name="integrity", metadata=metadata)
            if "no_leak" in selected:
                shared = shared_between_splits(snapshot)
                text = "; ".join(f"{n} in {a} and {b}" for (a, b), n in shared.items() if n) or "none is shared"
                yield dg.AssetCheckResult(
                    passed=not any(shared.values()),
                    asset_key=asset,
                    check_name="no_leak",
                    metadata={"finding": text, **{f"{a}_{b}": n for (a, b), n in shared.items()}},
                )

    return check


def _loss_check(entry: Entry, partitions: Partitions) -> dg.AssetChecksDefinition:
    asset = dg.AssetKey([entry.name, "checkpoints"])

    @partition_checks(
        asset,
        partitions,
        {"loss_finite": "Every recorded loss is a finite number."},
        blocking=["loss_finite"],
    )
    def check(context: dg.AssetCheckExecutionContext, store: StoreResource) -> Iterator[dg.AssetCheckResult]:
        with user_errors():
            reference = materialized(TrainingReference, store.store, entry.name, context.partition_key)
            history = Outcome.read(store.store.training(reference.fingerprint).result).history
        losses = [value for name, value, *_ in history if name == "train/loss"]
        yield dg.AssetCheckResult(
            passed=all(math.isfinite(value) for name, value, *_ in history if name.endswith("loss")),
            asset_key=asset,
            check_name="loss_finite",
            metadata={"first_loss": losses[0], "last_loss": losses[-1], "points": len(losses)},
        )

    return check


def _gates(entry: Entry, partitions: Partitions) -> dg.AssetChecksDefinition:
    asset = dg.AssetKey([entry.name, "eval_report"])
    descriptions = {
        "floor": "The metric is good enough.",
        "regression": "Not worse than the last good evaluation of this partition, on the same samples.",
        "calibration": "Confidence says how often the model is right.",
        "drift": "Not worse than the best of the last good evaluations of this partition.",
    }

    @partition_checks(asset, partitions, descriptions, blocking=gates.BLOCKING)
    def check(
        context: dg.AssetCheckExecutionContext, config: GateConfig, store: StoreResource
    ) -> Iterator[dg.AssetCheckResult]:
        from mlpipes.evaluation.records import evaluations_of, open_evaluation

        with user_errors():
            reference = materialized(EvaluationReference, store.store, entry.name, context.partition_key)
            current = open_evaluation(store.store, reference)
            before = [
                e for e in evaluations_of(store.store, entry.name, context.partition_key) if e.name < current.name
            ]
            limits = gates.Limits(config.floor, config.significance, config.calibration_error)
            selected = sorted(key.name for key in context.selected_asset_check_keys)
            found = gates.pass_through(current, before, entry.load().metric, limits, selected)
        for name, finding in found.items():
            yield dg.AssetCheckResult(
                passed=finding.passed,
                asset_key=asset,
                check_name=name,
                severity=dg.AssetCheckSeverity.ERROR if name in gates.BLOCKING else dg.AssetCheckSeverity.WARN,
                description=finding.text,
                metadata={"finding": finding.text, "evaluation": current.name, **finding.figures},
            )

    return check


def _replay_check(entry: Entry, partitions: Partitions) -> dg.AssetChecksDefinition:
    """Whether a scale's training comes out the same when it is done again; says nothing unless it is enabled."""
    asset = dg.AssetKey([entry.name, "checkpoints"])

    @partition_checks(
        asset,
        partitions,
        {REPLAY: "The same training done again elsewhere gives the same bits (config: `enabled: true`)."},
    )
    def check(
        context: dg.AssetCheckExecutionContext, config: ReplayConfig, store: StoreResource, ray: RayResource
    ) -> Iterator[dg.AssetCheckResult]:
        if not config.enabled:
            context.log.info("not asked for; set `enabled: true` to train a second time and compare")
            return
        from mlpipes.evaluation.replay import replay
        from mlpipes.store.status import find_training

        with user_errors():
            folder = find_training(store.store, entry.name, context.partition_key)
            found = replay(store.store, folder, ray.jobs)
        yield dg.AssetCheckResult(
            passed=found.equal,
            asset_key=asset,
            check_name=REPLAY,
            metadata={"comparison": dg.MetadataValue.md(found.markdown()), "seconds": found.seconds},
        )

    return check


def _served_drift_check(entry: Entry, partitions: Partitions) -> dg.AssetChecksDefinition:
    """Whether what the champion serves looks like what it was evaluated on; says nothing of other scales."""
    asset = dg.AssetKey([entry.name, "champion"])

    @partition_checks(
        asset, partitions, {SERVED_DRIFT: "What the champion has served of late looks like what it was evaluated on."}
    )
    def check(
        context: dg.AssetCheckExecutionContext, config: DriftConfig, store: StoreResource, mlflow: MlflowResource
    ) -> Iterator[dg.AssetCheckResult]:
        from mlpipes.evaluation.drift import DriftLimits
        from mlpipes.evaluation.monitor import drift_of_champion

        since = datetime.now(UTC) - timedelta(hours=config.hours)
        limits = DriftLimits(config.significance, config.least_effect, config.least_samples)
        with user_errors():
            found = drift_of_champion(store.store, mlflow.tracker(), entry.name, context.partition_key, since, limits)
        if found is None:
            context.log.info("the champion is of another scale")
            return
        champion, drift = found
        figures = {each.name: f"{each.statistic:.3f} (p={each.p_value:.2g})" for each in drift.figures}
        yield dg.AssetCheckResult(
            passed=not drift.moved,
            asset_key=asset,
            check_name=SERVED_DRIFT,
            severity=dg.AssetCheckSeverity.WARN,
            description=str(drift),
            metadata={
                "finding": str(drift),
                "moved": ", ".join(each.name for each in drift.moved) or "nothing",
                "model": f"models:/{champion.name}/{champion.version}",
                "n_served": drift.served,
                "n_evaluated": drift.evaluated,
                "p_threshold": drift.threshold,
                "least_effect": limits.least_effect,
                **({"figures": mapping_table(figures)} if figures else {}),
            },
        )

    return check
