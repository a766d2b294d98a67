"""The monitor: what a champion has served of late beside what it was evaluated on, both in the same figures."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import numpy as np

from mlpipes.data.ragged import Ragged
from mlpipes.data.snapshot import open_snapshot
from mlpipes.errors import ConfigError, CorruptionError
from mlpipes.evaluation.drift import Drift, DriftLimits, Figures, drift
from mlpipes.serving.current import Registry, Wanted
from mlpipes.serving.model import Registered, fetched, load
from mlpipes.serving.sampled import folder_of, served_since
from mlpipes.serving.signature import Column, Signature
from mlpipes.serving.summaries import summarized
from mlpipes.store.files import read_record, write_record
from mlpipes.store.layout import Store
from mlpipes.tracking.models import SCALE, SNAPSHOT, WEIGHTS, registered_name
from mlpipes.tracking.runs import Tracker
from mlpipes.workloads.golden import Values

SPLIT = "test"
_ROWS = 1000
"""Samples of the test split that are asked again, once a version."""


def drift_of_champion(
    store: Store, tracker: Tracker, workload: str, scale: str, since: datetime, limits: DriftLimits
) -> tuple[Registered, Drift] | None:
    """The champion, and how what it has served since then differs from its evaluation; None if it is of another scale.

    Raises ConfigError where there is no champion.
    """
    champion = Registry(lambda: tracker, Wanted(registered_name(workload)), store).wanted_now()
    if champion.tags.get(SCALE) != scale:
        return None
    folder = folder_of(store, champion.name, champion.version, champion.tags.get(WEIGHTS, ""))
    served = served_since(folder, since).columns
    if not served:  # then the model need not be asked
        return champion, drift({}, {}, limits)
    try:
        figures = evaluated(store, tracker, champion)
    except ConfigError as error:
        return champion, Drift(0, 0, limits.significance, note=str(error))
    return champion, drift(figures, served, limits)


def evaluated(store: Store, tracker: Tracker, version: Registered) -> Figures:
    """Figures of the test split and of a version's answers to it; it is asked once, and they are kept.

    Raises ConfigError where the split is gone, or does not hold what the model takes.
    """
    folder = version.folder(store)
    kept = store.root / "served_evaluations" / version.name / f"{folder.name}.json"
    try:
        columns = read_record(kept)["columns"]
    except (FileNotFoundError, CorruptionError):
        digest = version.tags.get(SNAPSHOT, "none")
        try:
            split = open_snapshot(store.snapshots / digest).columns(SPLIT)
        except FileNotFoundError as error:
            raise ConfigError(f"the snapshot that version {version.version} was evaluated on is gone") from error
        model = load(fetched(tracker, version, store))
        samples = samples_in(split, model.signature)
        columns = summarized(model, samples, model(samples))
        write_record(kept, {"columns": columns})
    return {name: np.array(column) for name, column in columns.items()}


def samples_in(split: Mapping[str, Any], signature: Signature) -> Values:
    """Some samples of a split as a model takes them, by chance and always the same. Raises ConfigError if there are none."""
    if signature.is_tensor:
        fitting = [column for column in split.values() if _fits(column, signature.inputs[0])]
    else:
        fitting = [split[wanted.name] for wanted in signature.inputs if wanted.name in split]
    if len(fitting) != len(signature.inputs):
        raise ConfigError("the test split does not hold samples as the model takes them")
    rows = np.random.default_rng(0).permutation(len(fitting[0]))[:_ROWS]
    found = [_rows(column, rows) for column in fitting]
    return found[0] if signature.is_tensor else {c.name: v for c, v in zip(signature.inputs, found, strict=True)}


def _fits(column: Any, wanted: Column) -> bool:
    if isinstance(column, Ragged) or column.dtype != wanted.dtype or column.ndim != 1 + len(wanted.shape):
        return False
    return all(length in (-1, found) for length, found in zip(wanted.shape, column.shape[1:], strict=True))


def _rows(column: Any, rows: np.ndarray) -> np.ndarray:
    chosen = column[rows]
    return np.array(list(chosen.texts()), dtype=object) if isinstance(chosen, Ragged) else np.asarray(chosen)
