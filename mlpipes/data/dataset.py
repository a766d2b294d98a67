"""The in-memory data set that a source hands out, with its provenance and content digest."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from mlpipes.data.ragged import arrays_of
from mlpipes.errors import DataError
from mlpipes.store.files import canonical_json

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
        """Raises DataError for splits that are not columns of equal length, or lack `train`."""
        if "train" not in self.splits:
            raise DataError(
                f"{self.provenance.name}: there is no split `train` among {', '.join(self.splits) or 'none'}"
            )
        for split, columns in self.splits.items():
            lengths = {name: len(column) for name, column in columns.items()}
            if len(set(lengths.values())) != 1:
                found = ", ".join(f"{name} {length:,}" for name, length in lengths.items()) or "none"
                raise DataError(f"{self.provenance.name}: the columns of split `{split}` differ in length: {found}")

    @property
    def counts(self) -> dict[str, int]:
        """Samples in each split."""
        return {name: len(next(iter(columns.values()))) for name, columns in self.splits.items()}

    def digest(self) -> str:
        """SHA-256 over the name, dtype, shape and bytes of every column of every split, and over the facts."""
        return digest_splits(self.splits, dict(self.facts))


class Source(Protocol):
    """A place that data come from. Loading it twice gives the same bytes or fails; it never falls back to other data."""

    def load(self) -> Dataset:
        """Read everything. Raises DataError saying what is missing and how to get it."""
        ...


def rows_digest(columns: Columns, content: Sequence[str]) -> str:
    """SHA-256 (hex) over a split's content and labels, row by row: whether two models were judged on the same samples.

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
