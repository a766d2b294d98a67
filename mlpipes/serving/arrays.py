"""An array of NumPy in a file (.npy), read some rows at a time: bounded memory, and no map of what others may cut."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mlpipes.errors import DataError


@dataclass(frozen=True)
class ArrayFile:
    """What the header of a .npy file says."""

    path: Path
    shape: tuple[int, ...]
    """(N, …): of all samples."""
    dtype: np.dtype
    by_columns: bool
    """Fortran's order: the first axis runs fastest."""
    offset: int
    """Where the values begin, in bytes."""

    @classmethod
    def of(cls, path: Path) -> "ArrayFile":
        """Read the header. Raises DataError for a file that is no array, or is shorter than it says."""
        try:
            found = np.lib.format.open_memmap(path, mode="r")  # looks at header and length, and reads nothing
        except Exception as error:  # a header is a literal of Python's, and what is raised depends on what is odd in it
            raise DataError(f"{path} is no array of NumPy: {error}") from error
        if found.ndim == 0:
            raise DataError(f"{path} holds a single number, and no samples")
        if found.dtype.hasobject or not found.dtype.itemsize:
            raise DataError(f"{path} holds {found.dtype}, which is no number: save numbers")
        by_columns = found.ndim > 1 and not found.flags.c_contiguous
        return cls(path, found.shape, found.dtype, by_columns, int(found.offset))

    def rows(self, at_once: int) -> Iterator[np.ndarray]:
        """All rows in order, (≤ `at_once`, …). Raises DataError if the file becomes shorter meanwhile."""
        with self.path.open("rb") as stream:
            for start in range(0, self.shape[0], at_once):
                count = min(at_once, self.shape[0] - start)
                yield self._by_columns(stream, start, count) if self.by_columns else self._by_rows(stream, start, count)

    def _by_rows(self, stream: BinaryIO, start: int, count: int) -> np.ndarray:
        inner = self.shape[1:]
        size = int(np.prod(inner, dtype=np.int64))
        return self._values(stream, start * size, count * size).reshape(count, *inner)

    def _by_columns(self, stream: BinaryIO, start: int, count: int) -> np.ndarray:
        rows, *inner = self.shape
        columns = [
            self._values(stream, column * rows + start, count) for column in range(int(np.prod(inner, dtype=np.int64)))
        ]
        return np.ascontiguousarray(np.reshape(columns, (*reversed(inner), count)).T)

    def _values(self, stream: BinaryIO, start: int, count: int) -> np.ndarray:
        stream.seek(self.offset + start * self.dtype.itemsize)
        data = stream.read(count * self.dtype.itemsize)
        if len(data) < count * self.dtype.itemsize:
            raise DataError(f"{self.path} became shorter while it was read; start again when nobody writes it")
        return np.frombuffer(data, self.dtype)
