"""The in-memory data set that a source hands out, with its provenance and content digest."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from mlpipes.data.ragged import Ragged, arrays_of
from mlpipes.errors import DataError
from mlpipes.store.files import canonical_json

MANY_DROPPED = 0.05
"""A greater share of a split's rows that a source leaves out is worth a warning."""
Columns = Mapping[str, Any]
"""Columns of equal length, one row a sample, by name: arrays (N, …), or `Ragged` where rows differ in length."""


@dataclass(frozen=True)
class Provenance:
    """Where data come from and what they are, for whoever reads a figure measured on them."""

    name: str
    licence: str
    origin: str
    fidelity: str
    notes: str = ""

    def as_dict(self) -> dict[str, str]:
        """The fields as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Dataset:
    """Named splits of columns: `train`, and `test` where the source brings one."""

    splits: Mapping[str, Columns]
    provenance: Provenance
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What a consumer must know beyond the columns, such as `class_names`; JSON, and part of the digest."""

    def __post_init__(self) -> None:
        """Raises DataError for splits and columns that would be passed over, or misread, later on."""
        if "train" not in self.splits or self.splits.keys() - {"train", "test"}:
            raise DataError(
                f"{self.provenance.name}: the source brings the splits {', '.join(map(repr, self.splits)) or 'none'}; it "
                "must bring 'train', may bring 'test', and nothing else: validation is taken from training (SplitPlan)"
            )
        for split, columns in self.splits.items():
            check_columns(f"{self.provenance.name}, {split}", columns, kinds="biufcSU")
        check_json(f"{self.provenance.name}: facts", self.facts)

    @property
    def counts(self) -> dict[str, int]:
        """Samples in each split."""
        return {name: len(next(iter(columns.values()))) for name, columns in self.splits.items()}

    @property
    def dropped(self) -> dict[str, dict[str, int]]:
        """How many rows the source has left out of each split, by reason, where its fact `dropped` says it."""
        said = self.facts.get("dropped")
        by_split = {name: said.get(name) for name in self.splits} if isinstance(said, Mapping) else {}
        return {
            name: {reason: count for reason, count in found.items() if isinstance(count, int) and count > 0}
            for name, found in by_split.items()
            if isinstance(found, Mapping)
        }

    def digest(self) -> str:
        """SHA-256 over the name, dtype, shape and bytes of every column of every split, and over the facts."""
        return digest_splits(self.splits, dict(self.facts))


def dropped_rows(dataset: Dataset) -> dict[str, str]:
    """What a source has left out, for people: count and share of the split's rows by split and reason."""
    return {
        f"{split}, {reason}": f"{count:,} of {total:,} rows ({count / total:.1%})"
        for split, found in dataset.dropped.items()
        for total in [dataset.counts[split] + sum(found.values())]
        for reason, count in found.items()
    }


def dropped_warning(dataset: Dataset) -> str | None:
    """What to tell about a source that has left out many rows of a split; None of any other."""
    told = []
    for split, found in dataset.dropped.items():
        lost = sum(found.values())
        if lost > MANY_DROPPED * (total := dataset.counts[split] + lost):
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in found.items())
            told.append(f"{lost:,} of {total:,} rows of {split} were left out ({lost / total:.1%}): {reasons}")
    return f"{dataset.provenance.name}: {'; '.join(told)}. Is that what you expect of these data?" if told else None


class Source(Protocol):
    """A place that data come from. Loading it twice gives the same bytes or fails; it never falls back to other data."""

    def load(self) -> Dataset:
        """Read everything. Raises DataError saying what is missing and how to get it."""
        ...


def check_columns(where: str, columns: Columns, kinds: str) -> None:
    """Raises DataError for columns of unequal length, and for what is no array of NumPy's `kinds` (nor `Ragged`)."""
    if len(lengths := {name: len(column) for name, column in columns.items()}) == 0:
        raise DataError(f"{where}: there is no column")
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name!r} {length:,}" for name, length in lengths.items())
        raise DataError(f"{where}: each column must have one row a sample, but their rows are {said}")
    for name, column in columns.items():
        if not isinstance(column, np.ndarray | Ragged):
            raise DataError(
                f"{where}: the column {name!r} is of type {type(column).__name__}; make a NumPy array of it, or a Ragged"
            )
        for array in arrays_of(name, column).values():
            if array.dtype.kind not in kinds:
                raise DataError(
                    f"{where}: the column {name!r} holds {array.dtype}; it must hold numbers: turn categories and texts "
                    "into numbers (`Ragged.of_texts` keeps texts), and times into their distance from some moment"
                )
            if not array.dtype.isnative:
                raise DataError(
                    f"{where}: the column {name!r} is in the byte order of other machines ({array.dtype.str}); "
                    "convert it: `column.astype(column.dtype.newbyteorder('='))`"
                )


def check_json(what: str, value: Any) -> None:
    """Raises DataError if a value is not JSON."""
    try:
        canonical_json(value)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{what} cannot be kept as JSON ({error}): say plain numbers, texts, lists and mappings (`array.tolist()`, "
            "`float(number)`), none of them NaN or infinite; of data with gaps, fill these first"
        ) from error


def rows_digest(columns: Columns, content: Sequence[str]) -> str:
    """SHA-256 (hex) over a split's content and labels, row by row: whether two models were evaluated on the same samples.

    Row numbers, and what else a source or a preparation puts beside them, do not count. Raises KeyError for a column that
    is not there.
    """
    named = {name: columns[name] for name in content} | {n: columns[n] for n in ("label",) if n in columns}
    return digest_splits({"rows": named}, {})


def digest_splits(splits: Mapping[str, Columns], facts: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over every column of every split, in name order, and over the facts."""
    sha = hashlib.sha256(canonical_json(facts))
    for split in sorted(splits):
        arrays = {
            key: array for name, column in splits[split].items() for key, array in arrays_of(name, column).items()
        }
        for name in sorted(arrays):
            array = np.ascontiguousarray(arrays[name])
            sha.update(canonical_json([split, name, array.dtype.str, list(array.shape)]))
            sha.update(array.data.cast("B") if array.size else b"")
    return sha.hexdigest()
