"""The scaling report: all scales of a workload at one glance, read from the store; what is missing or stale is named."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlpipes.errors import ConfigError
from mlpipes.evaluation.gates import summary
from mlpipes.evaluation.records import evaluations_of, open_evaluation
from mlpipes.reporting.metric import Metric
from mlpipes.reporting.report import Table
from mlpipes.scaling.table import (
    Law,
    Prices,
    ScaleResult,
    cost_table,
    laws_of,
    recommend,
    scaling_rows,
    scaling_table,
)
from mlpipes.store.files import digest_of, write_atomic, write_record
from mlpipes.store.layout import Store
from mlpipes.store.outcome import Outcome
from mlpipes.store.recipe import Recipe
from mlpipes.store.references import EvaluationReference, SnapshotReference, TrainingReference
from mlpipes.store.status import all_statuses
from mlpipes.training.code_version import code_version
from mlpipes.workloads.catalog import Entry

GPU_PRICE, CPU_PRICE = "MLPIPES_GPU_HOUR", "MLPIPES_CPU_HOUR"
NIGHTS = 14
NOTE = (
    "Training seconds and samples/s count time in steps only: no start-up, no evaluation, no checkpoints; so do "
    "device-hours and cost. Speed-up and efficiency compare with the fewest workers that did the same work (same data, "
    "batch, epochs, seed, hyperparameters and code). Equal weights digests mean the same model, bit for bit. CPU "
    "utilisation is CPU seconds per second and worker; GPU utilisation is NVML's (a dash: no GPU, or "
    "not known). Pareto: no other scale is as good on test for fewer device-hours."
)


def prices_from_environment() -> Prices:
    """Prices per device-hour from `$MLPIPES_GPU_HOUR` and `$MLPIPES_CPU_HOUR`. Raises ConfigError for what is no price."""

    def price(name: str) -> float | None:
        if not (text := os.environ.get(name)):
            return None
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{name}={text} is not a price per hour, such as 2.50")
        return value

    return Prices(price(GPU_PRICE), price(CPU_PRICE))


@dataclass(frozen=True)
class ScalingReport:
    """What was found about a workload's scales."""

    metric: str
    rows: Sequence[dict[str, Any]]
    laws: Sequence[Law]
    missing: Sequence[str]
    """Scales without an evaluation, and why."""
    stale: Sequence[str]
    """Scales whose evaluation is not of the latest data, code or training, and why."""
    nights: Table | None
    recommendation: str

    def markdown(self, entry: Entry) -> str:
        """The report as Markdown; the picture is referred to as a file beside it."""
        lines = [f"# {entry.name}: scaling report", "", entry.summary + ".", ""]
        for snapshot, code in sorted({(row["snapshot"], row["code"]) for row in self.rows}):
            inside = [row for row in self.rows if (row["snapshot"], row["code"]) == (snapshot, code)]
            lines += [f"Measured on the test split of snapshot {snapshot[:12]}, code {code}, {self.metric}:", ""]
            lines += [scaling_table(inside, self.metric).markdown(), "", cost_table(inside).markdown(), ""]
        lines += [f"Not evaluated: {text}.\n" for text in self.missing]
        lines += [f"Stale: {text}.\n" for text in self.stale]
        lines += [f"Recommended: {self.recommendation}.", ""]
        for law in self.laws:
            lines += [law.markdown(), ""]
        if self.nights is not None:
            lines += [f"## {self.nights.title}", "", self.nights.markdown(), ""]
        return "\n".join([*lines, NOTE, "", "![scaling](scaling_report.png)", ""])

    def write(self, store: Store, entry: Entry) -> tuple[str, bytes]:
        """Write Markdown, PNG and JSON to the store; returns the first two."""
        from mlpipes.scaling import figure

        folder, text = store.report(entry.name), self.markdown(entry)
        plot = figure.scaling(self.rows, self.laws, self.metric)
        write_atomic(folder / "scaling_report.png", plot)
        write_atomic(folder / "scaling_report.md", text.encode())
        content = {
            "metric": self.metric,
            "rows": list(self.rows),
            "laws": [
                {
                    "name": law.law.name,
                    "scales": list(law.scales),
                    "samples_per_second_of_one": law.law.single,
                    "contention": law.law.contention,
                    "coherency": law.law.coherency,
                    "intervals": [law.law.interval(number) for number in range(3)],
                    "forecasts": list(law.forecasts),
                }
                for law in self.laws
            ],
            "missing": list(self.missing),
            "stale": list(self.stale),
            "recommendation": self.recommendation,
        }
        write_record(folder / "scaling_report.json", content)
        return text, plot


def make_report(
    store: Store, entry: Entry, prices: Prices, deadline_seconds: float | None = None, budget: float | None = None
) -> ScalingReport:
    """Read the results of all scales. Raises ConfigError if none has been evaluated."""
    metric = entry.load().metric
    results, missing, stale, not_run = [], [], [], []
    for scale in entry.scales:
        reference = store.read_reference(EvaluationReference, entry.name, scale.key)
        if reference is None:
            not_run.append(scale)
            missing.append(f"{scale.key} ({_why_missing(store, entry, scale.key)})")
            continue
        if why := _why_unreadable(store, reference, metric):
            not_run.append(scale)
            missing.append(f"{scale.key} ({why})")
            continue
        result, recipe = _result(store, reference, metric)
        results.append(result)
        if reasons := _why_stale(store, entry, recipe, reference):
            stale.append(f"{scale.key} ({'; '.join(reasons)})")
    if not results:
        why = "; ".join(missing)
        raise ConfigError(
            f"no scale of {entry.name} has been evaluated; `mlpipes backfill {entry.name}` does that. {why}"
        )
    rows = scaling_rows(results, prices)
    return ScalingReport(
        str(metric),
        rows,
        laws_of(results, not_run, prices),
        missing,
        stale,
        _nights(store, entry, metric.name),
        recommend(rows, deadline_seconds, budget)[1],
    )


def _why_unreadable(store: Store, reference: EvaluationReference, metric: Metric) -> str | None:
    """Why an evaluation cannot be in the report, where it is of a time when the workload had another metric."""
    best = Outcome.read(store.training(reference.fingerprint).result).best.metrics
    if metric.name in best and metric.name in reference.estimates:
        return None
    return f"trained before {metric.name} was its metric; materialize it again"


def _result(store: Store, reference: EvaluationReference, metric: Metric) -> tuple[ScaleResult, Recipe]:
    folder = store.training(reference.fingerprint)
    recipe, outcome = Recipe.read(folder.recipe), Outcome.read(folder.result)
    shared = recipe.model_dump(mode="json")
    for field in ("workers", "gpus_per_worker", "cpus_per_worker"):
        del shared["scale"][field]
    return ScaleResult(
        scale=recipe.scale,
        snapshot=recipe.snapshot,
        code=recipe.code,
        validation=outcome.best.metrics[metric.name],
        test=reference.estimates[metric.name],
        metric=metric,
        train_seconds=outcome.train_seconds,
        samples_per_second=outcome.samples_per_second,
        weights_digest=open_evaluation(store, reference).meta.weights,  # the chosen epoch's, as everywhere
        # Seconds on different hardware do not compare either.
        comparable=digest_of(shared | {"device": outcome.environment["device"]}),
        samples=outcome.samples,
        usage=outcome.usage,
    ), recipe


def _why_missing(store: Store, entry: Entry, scale: str) -> str:
    for status in all_statuses(store):
        if (status.workload, status.scale) == (entry.name, scale):
            return f"training {status.state}" + (f": {status.error}" if status.error else "")
    return "never trained"


def _why_stale(store: Store, entry: Entry, recipe: Recipe, reference: EvaluationReference) -> list[str]:
    trained = store.read_reference(TrainingReference, entry.name, recipe.scale.key)
    data = store.read_reference(SnapshotReference, entry.name, recipe.scale.key)
    return [
        reason
        for reason, found in (
            ("trained by older code", recipe.code != code_version(entry.implementation)),
            (
                "trained again since, and not evaluated",
                trained is not None and trained.fingerprint != reference.fingerprint,
            ),
            ("the data have changed since", data is not None and data.digest != recipe.snapshot),
        )
        if found
    ]


def _nights(store: Store, entry: Entry, metric: str) -> Table | None:
    """The figures of the last nights, scale by scale, and what did not pass the gates."""
    cells: dict[str, dict[str, str]] = {}
    for scale in entry.scales:
        for evaluation in evaluations_of(store, entry.name, scale.key):
            if (night := evaluation.meta.night) is None or not evaluation.has(metric):
                continue
            text = f"{evaluation.estimate(metric).value:.4f} {summary(evaluation.verdict)}"
            cells.setdefault(night, {})[scale.key] = text
    if not cells:
        return None
    scales = [scale.key for scale in entry.scales if any(scale.key in night for night in cells.values())]
    rows = [[night, *(cells[night].get(key, "–") for key in scales)] for night in sorted(cells)[-NIGHTS:]]
    return Table("Nightly evaluations", ["night", *scales], rows)
