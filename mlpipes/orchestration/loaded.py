"""The data set that this process has just loaded, kept for the snapshot that the same run makes of it."""

from typing import TYPE_CHECKING

import dagster as dg

if TYPE_CHECKING:
    from mlpipes.data.dataset import Dataset

_KEPT: dict[str, "Dataset"] = {}


def keep(run: dg.DagsterRun, snapshot: dg.AssetKey, digest: str, dataset: "Dataset") -> None:
    """Keep it if the run goes on to its snapshot, which takes it; to load it again can be minutes of decoding."""
    if not run.asset_selection or snapshot in run.asset_selection:  # a job without a selection is the whole chain
        _KEPT.clear()
        _KEPT[digest] = dataset


def take(digest: str) -> "Dataset | None":
    """What was kept, and is not any more: while it trains, the run's process has no use for so much memory."""
    kept = _KEPT.pop(digest, None)
    _KEPT.clear()
    return kept
