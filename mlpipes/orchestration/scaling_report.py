"""The `scaling_report` asset: the report over all scales in Dagster and MLflow, rebuilt when evaluations change."""

import dagster as dg
from pydantic import Field

from mlpipes.orchestration.metadata import picture, run_link, table, user_errors
from mlpipes.orchestration.resources import MlflowResource, StoreResource
from mlpipes.scaling.report import NOTE, make_report, prices_from_environment
from mlpipes.scaling.table import cost_table, scaling_table
from mlpipes.workloads.catalog import Entry


class ReportConfig(dg.Config):
    """Limits that the recommended scale must keep."""

    deadline_seconds: float | None = Field(default=None, gt=0, description="of training, start-up apart")
    budget: float | None = Field(
        default=None, gt=0, description="needs $MLPIPES_GPU_HOUR or $MLPIPES_CPU_HOUR, the price of a device-hour"
    )


def scaling_report_asset(entry: Entry, owners: list[str]) -> dg.AssetsDefinition:
    """The unpartitioned report over all scales of a workload."""

    @dg.asset(
        key=[entry.name, "scaling_report"],
        group_name=entry.name,
        deps=[dg.AssetKey([entry.name, "eval_report"])],
        owners=owners,
        kinds={"markdown", "matplotlib"},
        tags={"workload": entry.name},
        description="Quality, speed, efficiency, cost and forecast over all scales; missing and stale ones are named.",
        output_required=False,
        # Scales that are missing are named in it, so it does not wait for them; it waits for runs in progress.
        automation_condition=dg.AutomationCondition.eager().without(~dg.AutomationCondition.any_deps_missing()),
    )
    def scaling_report(
        context: dg.AssetExecutionContext, config: ReportConfig, store: StoreResource, mlflow: MlflowResource
    ) -> dg.MaterializeResult:
        with user_errors():
            report = make_report(store.store, entry, prices_from_environment(), config.deadline_seconds, config.budget)
            _, plot = report.write(store.store, entry)
            tracker, folder = mlflow.tracker(), store.store.report(entry.name)
            run_id = tracker.run_of(f"mlpipes/{entry.name}", "scaling-report", "scaling_report", {}, {})
            tracker.log_files(run_id, "scaling_report", sorted(folder.glob("scaling_report.*")))
            tracker.set_status(run_id, "FINISHED")
        return dg.MaterializeResult(
            metadata={
                "recommended": report.recommendation,
                "metric": report.metric,
                "table": table(scaling_table(report.rows, report.metric)),
                "plot": picture(plot, "scaling"),
                "cost": table(cost_table(report.rows)),
                **{
                    f"law_{number}": dg.MetadataValue.md(law.markdown())
                    for number, law in enumerate(report.laws, start=1)
                },
                **({} if report.nights is None else {"nights": table(report.nights)}),
                "missing": ", ".join(report.missing) or "none",
                "stale": ", ".join(report.stale) or "none",
                "note": NOTE,
                "distinct_models": len({row["weights_digest"] for row in report.rows}),
                "report": dg.MetadataValue.path(str(folder / "scaling_report.md")),
                "mlflow": run_link(tracker, run_id),
            }
        )

    return scaling_report
