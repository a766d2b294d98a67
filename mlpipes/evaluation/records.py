"""Evaluations in the store: published once, listed by partition, each with the verdict of the gates beside it."""

import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from mlpipes.data.snapshot import KIND as SNAPSHOT
from mlpipes.data.snapshot import Snapshot
from mlpipes.errors import ConfigError, CorruptionError, FormatError
from mlpipes.reporting.report import Estimate, Report
from mlpipes.settings import problems
from mlpipes.store.files import canonical_json, open_published, publishing, read_record, write_record
from mlpipes.store.layout import Store, TrainingFolder
from mlpipes.store.references import EvaluationReference

KIND, VERSION = "evaluation", 2
NIGHT_TAG = "mlpipes/night"
"""Dagster tag of a nightly run: the date that it stands for."""


class Subject(BaseModel):
    """What was evaluated, on what, and by whom."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    workload: str
    scale: str
    seed: int
    fingerprint: str
    """Of the training."""
    weights: str
    """Digest."""
    snapshot: str
    """Digest."""
    rows: dict[str, str] = {}
    """`rows_digest` of splits; an older evaluation does not note it."""
    split: str
    n: int
    """Samples of the split."""
    data: str
    """Their fidelity: real, synthetic, …"""
    night: str | None
    """The date that a nightly run stands for."""
    dagster_run_id: str


class EvaluationMeta(Subject):
    """What was evaluated and what was found, as the manifest keeps it."""

    time: str
    """ISO 8601, UTC."""
    estimates: dict[str, Estimate]
    quantities: dict[str, float]
    """Figures without an interval."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one model on one split."""

    path: Path
    meta: EvaluationMeta

    @property
    def name(self) -> str:
        """Its name: when, and in which Dagster run."""
        return self.path.name

    @property
    def when(self) -> str:
        """The night that it stands for, or the moment at which it was made."""
        return self.meta.night or self.meta.time

    def estimate(self, metric: str) -> Estimate:
        """A figure with its interval. Raises KeyError."""
        return self.meta.estimates[metric]

    def has(self, metric: str) -> bool:
        """Whether it says a figure: an older one may be of when the workload had another metric."""
        return metric in self.meta.estimates

    def same_rows(self, other: "Evaluation", split: str | None = None) -> bool:
        """Whether both models met the same samples in a split (default: the one that they were evaluated on).

        Snapshots may differ all the same, in statistics, tokens or other splits.
        """
        name = split or self.meta.split
        return self.meta.snapshot == other.meta.snapshot or self._rows(name) == other._rows(name)

    def _rows(self, split: str) -> str:
        noted = self.meta.rows.get(split)
        return noted or _rows_of(Store(self.path.parents[3]).snapshots / self.meta.snapshot, split)

    def scores(self) -> np.ndarray:
        """How well the model did on each sample, float32 (N,), greater is better. Raises CorruptionError."""
        published = open_published(self.path, kind=KIND, versions=frozenset({VERSION}))
        return np.load(published.path / "scores.npy", allow_pickle=False)

    @property
    def verdict(self) -> dict[str, Any] | None:
        """What the gates said; None if they were not asked."""
        try:
            return read_record(self._verdict_path)
        except FileNotFoundError:
            return None

    def record(self, verdict: Mapping[str, Any]) -> None:
        """Record what the gates say."""
        write_record(self._verdict_path, verdict)

    @property
    def is_good(self) -> bool:
        """Whether all blocking gates let it pass."""
        verdict = self.verdict
        return verdict is not None and verdict["passed"]

    @property
    def _verdict_path(self) -> Path:
        return self.path.parent / f"{self.name}.verdict.json"


@cache
def _rows_of(snapshot: Path, split: str) -> str:
    """The digest of a split's rows, for an evaluation that does not note it; the snapshot's own where that is gone."""
    with suppress(FileNotFoundError, CorruptionError):
        return Snapshot(open_published(snapshot, kind=SNAPSHOT, verify=False)).rows(split)
    return snapshot.name


def publish_evaluation(
    folder: TrainingFolder, report: Report, scores: np.ndarray, title: str, subject: Subject
) -> Evaluation:
    """Write a report with its pictures and each sample's score."""
    now = datetime.now(UTC)
    target = folder.evaluation(f"{now:%Y%m%dT%H%M%S%f}-{subject.dagster_run_id[:8]}")
    found = {"time": now.isoformat(timespec="seconds"), "estimates": report.estimates, "quantities": report.quantities}
    meta = EvaluationMeta.model_validate(dict(subject) | found)
    described = meta.model_dump(mode="json")
    array = io.BytesIO()
    np.save(array, scores.astype(np.float32), allow_pickle=False)
    with publishing(target, kind=KIND, version=VERSION) as draft:
        (draft.path / "report.json").write_bytes(canonical_json(report.as_dict() | {"measured_on": described}))
        (draft.path / "report.md").write_text(report.markdown(title, measured_on(subject)), encoding="utf-8")
        (draft.path / "scores.npy").write_bytes(array.getvalue())
        for name, png in report.figures.items():
            (draft.path / f"{name}.png").write_bytes(png)
        draft.meta.update(described)
    return Evaluation(target, meta)


def measured_on(subject: Subject) -> dict[str, Any]:
    """What the figures of an evaluation were measured on, for people."""
    return {
        "split": subject.split,
        "n": f"{subject.n:,}",
        "data": subject.data,
        "snapshot": subject.snapshot[:12],
        "scale": subject.scale,
        "seed": subject.seed,
        "weights": subject.weights[:12],
    }


def history_points(history: Sequence[Evaluation], metric: str) -> list[tuple[str, Estimate, bool | None]]:
    """Evaluations as (when, figure, whether the gates let it pass) for a plot or a table."""
    known = [e for e in history if e.has(metric)]
    return [(e.when[:10], e.estimate(metric), (e.verdict or {"passed": None})["passed"]) for e in known]


def _opened(path: Path, *, verify: bool) -> Evaluation:
    meta = open_published(path, kind=KIND, versions=frozenset({VERSION}), verify=verify).meta
    try:
        return Evaluation(path, EvaluationMeta.model_validate(meta))
    except ValidationError as error:
        raise FormatError(f"{path} was written by another version of mlpipes ({problems(error)})") from error


def open_evaluation(store: Store, reference: EvaluationReference) -> Evaluation:
    """The evaluation that a reference points to. Raises ConfigError if it is gone, CorruptionError, or FormatError."""
    path = store.training(reference.fingerprint).evaluation(reference.evaluation)
    try:
        return _opened(path, verify=True)
    except FileNotFoundError as error:
        raise ConfigError(f"the evaluation {path} is gone; materialize `eval_report` again") from error


def evaluations_of(store: Store, workload: str, scale: str) -> list[Evaluation]:
    """All evaluations of a partition's models, whichever training they came from, the oldest first.

    Reads descriptions only; an unreadable one is left out, for `Evaluation.scores` verifies what is used.
    """
    found = []
    for path in store.root.glob("trainings/*/evaluations/*/"):
        try:
            evaluation = _opened(path, verify=False)
        except (CorruptionError, FormatError, FileNotFoundError):
            continue
        if (evaluation.meta.workload, evaluation.meta.scale) == (workload, scale):
            found.append(evaluation)
    return sorted(found, key=lambda evaluation: evaluation.name)
