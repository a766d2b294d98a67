"""The live view: what a running training shows in Dagster, on its partition and in the curves of its workload."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from mlpipes.assets.metadata import table
from mlpipes.reporting.report import Table
from mlpipes.status import all_statuses, progress_text
from mlpipes.store import Store
from mlpipes.training.specification import TrainingJob

OBSERVATION_SECONDS = 5.0
_SHOWN = 20


def live_asset(workload: str) -> dg.AssetKey:
    """The unpartitioned asset with the curves of all scales of a workload.

    Dagster plots one point for each partition of a partitioned asset; a curve over time needs an asset without.
    """
    return dg.AssetKey([workload, "live"])


class LiveView:
    """Turns a training's messages into observations, some seconds apart."""

    def __init__(self, context: dg.AssetExecutionContext, job: TrainingJob) -> None:
        self.context, self.job, self._shown = context, job, 0.0
        self._latest_checkpoint: int | None = None

    def show(self, message: Mapping[str, Any]) -> None:
        """Take note of any message, and show progress and validation."""
        kind, scale = message["kind"], self.job.recipe.scale.key
        if kind == "checkpoint":
            self._latest_checkpoint = message["step"]
        elif kind == "progress" and time.monotonic() - self._shown >= OBSERVATION_SECONDS:
            self._shown = time.monotonic()
            figures = {name: message[name] for name in ("epoch", "loss", "samples_per_second", "eta_seconds")}
            text = f"step {message['step']} of {message['total_steps']}"
            checkpoint = {} if self._latest_checkpoint is None else {"latest_checkpoint": self._latest_checkpoint}
            partition = self.context.partition_key
            self.context.log_event(
                dg.AssetObservation(
                    self.context.asset_key, partition=partition, description=text, metadata=figures | checkpoint
                )
            )
            self._curves({f"{name} · {scale}": figures[name] for name in ("loss", "samples_per_second", "eta_seconds")})
        elif kind == "epoch":
            self._curves({f"validation {name} · {scale}": value for name, value in message["metrics"].items()})

    def _curves(self, figures: dict[str, float]) -> None:
        workload = self.job.recipe.workload
        rows = [progress_text(s) for s in all_statuses(Store(Path(self.job.store))) if s.workload == workload][:_SHOWN]
        shown: dict[str, Any] = dict(figures)
        if rows:
            shown["trainings"] = table(Table("Trainings", list(rows[0]), [list(row.values()) for row in rows]))
        self.context.log_event(dg.AssetObservation(live_asset(workload), metadata=shown))
