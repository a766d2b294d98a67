"""Jobs: a workload's whole chain for a scale, its evaluation alone, its replay."""

from collections.abc import Iterable
from typing import Any

import dagster as dg

from mlpipes.orchestration.checks import REPLAY
from mlpipes.workloads.catalog import Entry


def jobs_of(entries: Iterable[Entry]) -> list[Any]:
    """For each workload `<name>_chain` (dataset to champion), `<name>_evaluation` (evaluate again), `<name>_replay`."""
    jobs = []
    for entry in entries:
        champion = dg.AssetSelection.assets(dg.AssetKey([entry.name, "champion"]))
        jobs += [
            dg.define_asset_job(
                f"{entry.name}_chain", champion.upstream(), description=f"Train, evaluate and promote {entry.name}"
            ),
            dg.define_asset_job(
                f"{entry.name}_evaluation",
                dg.AssetSelection.assets([entry.name, "eval_report"], [entry.name, "champion"]),
                description=f"Evaluate {entry.name} again; promote what passes the gates",
            ),
            dg.define_asset_job(
                f"{entry.name}_replay",
                # With the asset, which is found finished: Dagster knows no partitions of a job of checks alone.
                dg.AssetSelection.assets(dg.AssetKey([entry.name, "checkpoints"])),
                config={"ops": {f"{entry.name}__checkpoints__{REPLAY}": {"config": {"enabled": True}}}},
                description=f"Train {entry.name} a second time elsewhere, and compare bit for bit",
            ),
        ]
    return jobs
