"""The data set that this process has just loaded, kept for the snapshot that the same run makes of it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlpipes.data.dataset import Dataset

_KEPT: dict[tuple[str, str], "Dataset"] = {}
"""One at most, by its workload and its digest."""


def keep(workload: str, digest: str, dataset: "Dataset", source: Any) -> None:
    """Keep what one of our sources has loaded, instead of what was kept before: again, it can be minutes of decoding.

    A source of somebody else is loaded again for the snapshot, which shows whether it gives the same bytes twice.
    """
    drop()
    if type(source).__module__.startswith("mlpipes."):
        _KEPT[workload, digest] = dataset


def take(workload: str, digest: str) -> "Dataset | None":
    """What was kept, and is not any more."""
    kept = _KEPT.get((workload, digest))
    drop()
    return kept


def drop() -> None:
    """Keep nothing; also what a run without a snapshot left, which has no use for so much memory while it trains."""
    _KEPT.clear()
