"""Promotion: whether a model that passed the gates takes the champion's place, and why."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlpipes.errors import FormatError
from mlpipes.evaluation.gates import Limits
from mlpipes.evaluation.records import Evaluation, evaluations_of
from mlpipes.reporting.statistics import paired
from mlpipes.store.layout import Store

if TYPE_CHECKING:
    from mlpipes.tracking.champion import Version
    from mlpipes.workloads.base import Workload

VALIDATION = "validation"


@dataclass(frozen=True)
class Decision:
    """What becomes of the alias."""

    promoted: bool
    reason: str


def decide(store: Store, workload: "Workload", candidate: Evaluation, champion: "Version | None") -> Decision:
    """Whether a model that passed the gates becomes champion, by the rows that both models met.

    Not in the place of one that a person chose. What has the champion's own weights, exported anew, takes it.

    Tested on other rows: it is on newer data, and takes the place. Tested and validated on the same rows: the better one
    by validation, so that test stays unseen by the choice. Tested on the same rows but validated on others (another
    split, another metric then): validation figures do not compare, so it must do the test rows better than chance
    explains, sample by sample. Training rows may differ: neither model has trained on rows that it is evaluated on.
    """
    name = workload.metric.name
    mine = _validation(store, workload, candidate.meta.fingerprint)
    value = "" if mine is None else f"; validation {name} {mine[1]:.4f}"
    if champion is None:
        return Decision(True, f"the first to pass the gates{value}")
    who = f"version {champion.version} ({champion.scale})"
    if champion.by_hand:
        return Decision(
            False,
            f"a person made {who} champion ({champion.by_hand}), and automation leaves it{value}; "
            f"`mlpipes release {candidate.meta.workload}` lets it choose again",
        )
    if champion.fingerprint == candidate.meta.fingerprint:
        return Decision(True, f"the weights of {who}, exported anew{value}")
    found = evaluations_of(store, candidate.meta.workload, champion.scale)
    theirs = next((e for e in reversed(found) if e.meta.fingerprint == champion.fingerprint), None)

    def alike(split: str) -> bool:
        same = champion.snapshot == candidate.meta.snapshot
        return same or (theirs is not None and candidate.same_rows(theirs, split))

    other = _validation(store, workload, champion.fingerprint)
    if theirs is not None and not alike(candidate.meta.split):
        return Decision(True, f"passed the gates on newer data; {who} was tested on other samples")
    if mine is not None and other is not None and alike(VALIDATION):
        better, text = mine[0] > other[0], f"validation {name} {mine[1]:.4f} against {other[1]:.4f} of {who}"
    elif theirs is None:
        return Decision(True, f"passed the gates, and of {who} nothing is left to compare with{value}")
    else:
        difference = paired(theirs.scores(), candidate.scores())
        better = difference.is_better(Limits.significance)
        text = f"validated otherwise than {who}; score per sample of the same test samples {difference}"
    return Decision(better, text if better else f"{text}: not better, the champion stays")


def _validation(store: Store, workload: "Workload", fingerprint: str) -> tuple[tuple[Any, ...], float] | None:
    """A model's sort key and metric by validation; None where it is gone, or of when the workload had another metric."""
    from mlpipes.training.model import open_model

    try:
        metrics = open_model(store.training(fingerprint).model)["metrics"]
        return workload.selection_key(metrics), metrics[workload.metric.name]
    except (FileNotFoundError, FormatError, KeyError):
        return None
