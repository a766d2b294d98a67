"""The live view: what a running training shows in Dagster, on its partition and in the curves of its workload."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from mlpipes.compute.jobs import Waiting
from mlpipes.orchestration.metadata import table
from mlpipes.reporting.report import Table
from mlpipes.store.layout import Store
from mlpipes.store.messages import CheckpointSaved, EpochEnded, Finished, Message, Progressed
from mlpipes.store.status import Statuses, TrainingStatus, progress_text
from mlpipes.store.training_job import TrainingJob

OBSERVATION_SECONDS = 5.0
_SHOWN = 20
_COLUMNS = ("scale", "seed", "state", "step", "loss", "samples/s", "ETA s")


def live_asset(workload: str) -> dg.AssetKey:
    """The unpartitioned asset with the curves of all scales of a workload.

    Dagster plots one point for each partition of a partitioned asset; a curve over time needs an asset without.
    """
    return dg.AssetKey([workload, "live"])


class LiveView:
    """Turns a training's messages into observations, some seconds apart."""

    def __init__(self, context: dg.AssetExecutionContext, job: TrainingJob, links: Mapping[str, Any]) -> None:
        self.context, self.job, self.links, self._shown = context, job, dict(links), 0.0
        self._statuses = Statuses(Store(Path(job.store)))
        self._figures: dict[str, float] = {}
        self._where, self._is_news = "", False

    def show(self, event: Message | Waiting) -> None:
        """Take note of a message, or that there is none, and show what is new if it is time to."""
        self._is_news |= isinstance(event, Progressed | EpochEnded | CheckpointSaved)
        match event:
            case CheckpointSaved():
                self._figures["latest_checkpoint"] = event.step
            case Progressed():
                self._figures |= event.model_dump(include={"epoch", "loss", "samples_per_second", "eta_seconds"})
                self._where = f"step {event.step} of {event.total_steps}"
            case EpochEnded():
                self._figures |= {f"validation_{name}": value for name, value in event.metrics.items()}
            case _:
                pass
        due = time.monotonic() - self._shown >= OBSERVATION_SECONDS
        if self._figures and self._is_news and (isinstance(event, Finished) or due):
            self._shown, self._is_news = time.monotonic(), False
            self._observe()

    def _observe(self) -> None:
        recipe = self.job.recipe
        self.context.log_event(
            dg.AssetObservation(
                self.context.asset_key,
                partition=self.context.partition_key,
                description=self._where,
                metadata=self._figures | self.links,
            )
        )
        curves: dict[str, Any] = {f"{name} · {recipe.scale.key}": value for name, value in self._figures.items()}
        curves[f"mlflow · {recipe.scale.key}"] = self.links["mlflow"]
        curves["trainings"] = table(_table_of(self._statuses.latest(), recipe.workload))
        self.context.log_event(dg.AssetObservation(live_asset(recipe.workload), metadata=curves))


def _table_of(statuses: list[TrainingStatus], workload: str) -> Table:
    """The state of a workload's trainings, in the order given."""
    rows = [progress_text(status) for status in statuses if status.workload == workload]
    return Table("Trainings", _COLUMNS, [[row[name] for name in _COLUMNS] for row in rows[:_SHOWN]])
