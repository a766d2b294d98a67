"""The `scaling_report` asset: all scales of a workload at one glance, missing and incomparable ones named."""

from collections.abc import Sequence
from typing import Any

import dagster as dg

from mlpipes.assets.metadata import picture, table, user_errors
from mlpipes.errors import ConfigError
from mlpipes.files import digest_of, read_record, write_atomic, write_record
from mlpipes.reporting.scaling import ScaleResult, scaling_rows, scaling_table
from mlpipes.resources import StoreResource
from mlpipes.store import Store
from mlpipes.training.recipe import Recipe
from mlpipes.workloads.catalog import Entry

NOTE = (
    "Training seconds and samples/s count time in steps only: no start-up, no evaluation, no checkpoints. Speed-up and "
    "efficiency compare with the fewest workers that did the same work (same data, batch, epochs, seed, hyperparameters "
    "and code). Equal weights digests mean the same model, bit for bit."
)


def collect(store: Store, entry: Entry, metric: str) -> tuple[list[ScaleResult], list[str]]:
    """The results of all scales that have been evaluated, and the keys of those that have not."""
    results, missing = [], []
    for scale in entry.scales:
        reference = store.read_reference(entry.name, "eval_report", scale.key)
        if reference is None:
            missing.append(scale.key)
            continue
        folder = store.training(reference["fingerprint"])
        recipe, outcome = Recipe.model_validate(read_record(folder.recipe)), read_record(folder.result)
        shared = recipe.model_dump(mode="json")
        for field in ("workers", "gpus_per_worker", "cpus_per_worker"):
            del shared["scale"][field]
        results.append(
            ScaleResult(
                scale=recipe.scale,
                snapshot=recipe.snapshot,
                code=recipe.code,
                validation=outcome["best"]["metrics"][metric],
                test=reference["estimates"][metric],
                train_seconds=outcome["train_seconds"],
                samples_per_second=outcome["samples_per_second"],
                weights_digest=outcome["weights_digest"],
                # Seconds on different hardware do not compare either.
                comparable=digest_of(shared | {"device": outcome["environment"]["device"]}),
            )
        )
    return results, missing


def report_text(entry: Entry, rows: Sequence[dict[str, Any]], missing: Sequence[str], metric: str) -> str:
    """The report as Markdown."""
    lines = [f"# {entry.name}: scaling report", "", entry.summary + ".", ""]
    for snapshot, code in sorted({(row["snapshot"], row["code"]) for row in rows}):
        inside = [row for row in rows if (row["snapshot"], row["code"]) == (snapshot, code)]
        lines += [f"Snapshot {snapshot[:12]}, code {code}:", "", scaling_table(inside, metric).markdown(), ""]
    if missing:
        lines += [f"Not evaluated yet: {', '.join(missing)}.", ""]
    return "\n".join([*lines, NOTE, "", "![scaling](scaling_report.png)", ""])


def scaling_report_asset(entry: Entry, owners: list[str]) -> dg.AssetsDefinition:
    """The unpartitioned report over all scales of a workload."""

    @dg.asset(
        key=[entry.name, "scaling_report"],
        group_name=entry.name,
        deps=[dg.AssetKey([entry.name, "eval_report"])],
        owners=owners,
        kinds={"markdown", "matplotlib"},
        tags={"workload": entry.name},
        description="Accuracy, speed and efficiency over all scales; missing scales are named.",
        output_required=False,
    )
    def scaling_report(store: StoreResource) -> dg.MaterializeResult:
        from mlpipes.reporting import figures

        with user_errors():
            metric = entry.load().primary_metric
            results, missing = collect(store.store, entry, metric)
            if not results:
                raise ConfigError(f"no scale of {entry.name} has been evaluated; materialize eval_report of one first")
        rows = scaling_rows(results)
        folder, plot = store.store.report(entry.name), figures.scaling(rows, metric)
        text = report_text(entry, rows, missing, metric)
        write_atomic(folder / "scaling_report.png", plot)
        write_atomic(folder / "scaling_report.md", text.encode())
        write_record(folder / "scaling_report.json", {"metric": metric, "rows": rows, "missing": missing})
        return dg.MaterializeResult(
            metadata={
                "table": table(scaling_table(rows, metric)),
                "plot": picture(plot, "scaling"),
                "missing": ", ".join(missing) or "none",
                "note": NOTE,
                "distinct_models": len({row["weights_digest"] for row in rows}),
                "report": dg.MetadataValue.path(str(folder / "scaling_report.md")),
            }
        )

    return scaling_report
