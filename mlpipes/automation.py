"""Jobs: the whole chain of a workload's scale, and its evaluation alone."""

from collections.abc import Iterable
from typing import Any

import dagster as dg

from mlpipes.assets.checks import REPLAY
from mlpipes.workloads.catalog import Entry


def jobs_of(entries: Iterable[Entry]) -> list[Any]:
    """For each workload `<name>_chain` (dataset to eval_report), `<name>_evaluation` (that alone), `<name>_replay`."""
    jobs = []
    for entry in entries:
        report = dg.AssetSelection.assets(dg.AssetKey([entry.name, "eval_report"]))
        jobs += [
            dg.define_asset_job(f"{entry.name}_chain", report.upstream(), description=f"Train and judge {entry.name}"),
            dg.define_asset_job(f"{entry.name}_evaluation", report, description=f"Judge {entry.name} again"),
            dg.define_asset_job(
                f"{entry.name}_replay",
                # With the asset, which is found finished: Dagster knows no partitions of a job of checks alone.
                dg.AssetSelection.assets(dg.AssetKey([entry.name, "checkpoints"])),
                config={"ops": {f"{entry.name}__checkpoints__{REPLAY}": {"config": {"enabled": True}}}},
                description=f"Train {entry.name} a second time elsewhere, and compare bit for bit",
            ),
        ]
    return jobs
