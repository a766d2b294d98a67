"""Ragged columns: rows of different lengths, such as texts or token ids, in one flat array that can be memory-mapped."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """A column of N rows: row i is `values[offsets[i]:offsets[i + 1]]`."""

    values: np.ndarray
    """All rows one after the other, (total,)."""
    offsets: np.ndarray
    """Where rows begin and the last one ends, int64 (N + 1,)."""

    @classmethod
    def of(cls, rows: Sequence[np.ndarray], dtype: np.dtype | type) -> "Ragged":
        """The column of some rows, each 1-D."""
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        values = np.concatenate([np.asarray(row, dtype=dtype) for row in rows]) if rows else np.empty(0, dtype=dtype)
        return cls(values, offsets)

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> "Ragged":
        """The column of some texts, as UTF-8 bytes."""
        return cls.of([np.frombuffer(text.encode(), dtype=np.uint8) for text in texts], np.uint8)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, rows: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, rows: np.ndarray) -> "Ragged": ...
    def __getitem__(self, rows: "int | np.ndarray") -> "np.ndarray | Ragged":
        """One row, or the column of the given row numbers (int64) or mask (bool)."""
        if isinstance(rows, int | np.integer):
            return self.values[self.offsets[rows] : self.offsets[rows + 1]]
        numbers = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        return Ragged.of([self[int(row)] for row in numbers], self.values.dtype)

    @property
    def lengths(self) -> np.ndarray:
        """The length of each row, int64 (N,)."""
        return np.diff(self.offsets)

    def texts(self) -> Iterator[str]:
        """The rows as text; only of a column of UTF-8 bytes."""
        for row in range(len(self)):
            yield self[row].tobytes().decode()


Column = np.ndarray | Ragged


def arrays_of(name: str, column: Column) -> dict[str, np.ndarray]:
    """The arrays that a column is stored as, by name."""
    if isinstance(column, Ragged):
        return {f"{name}.values": column.values, f"{name}.offsets": column.offsets}
    return {name: column}
