"""Jobs: the whole chain of a workload's scale, and its evaluation alone."""

from collections.abc import Iterable
from typing import Any

import dagster as dg

from mlpipes.workloads.catalog import Entry


def jobs_of(entries: Iterable[Entry]) -> list[Any]:
    """For each workload, `<name>_chain` (dataset to eval_report) and `<name>_evaluation` (eval_report only)."""
    jobs = []
    for entry in entries:
        report = dg.AssetSelection.assets(dg.AssetKey([entry.name, "eval_report"]))
        jobs += [
            dg.define_asset_job(f"{entry.name}_chain", report.upstream(), description=f"Train and judge {entry.name}"),
            dg.define_asset_job(f"{entry.name}_evaluation", report, description=f"Judge {entry.name} again"),
        ]
    return jobs
