"""Cells of a table as text: what stands in a file, before anyone decides whether it is a class, a number or missing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

_EXACT = 2**53


@dataclass(frozen=True)
class Foreign:
    """A cell that is neither text, number nor truth value."""

    kind: str
    """Its type in words, such as `list` or `date32[day]`."""


Cell = str | Foreign | None
"""The text of a cell as it was written; None where a format says that nothing is there."""


@dataclass(frozen=True)
class RawTable:
    """A table as it was found."""

    columns: dict[str, Sequence[Cell]]
    class_names: dict[str, list[str]]
    """Of columns of class numbers whose file names the classes: those names. Such cells hold names already."""
    how: str
    """How the file was read, for whoever wonders."""


def cell_of(value: Any) -> Cell:
    """The text of a typed value; NaN is missing, and a whole float has no point, as nobody wrote one."""
    if value is None or isinstance(value, str | Foreign):
        return value
    if isinstance(value, bool | np.bool_):
        return str(bool(value))
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, float | np.floating):
        number = float(value)
        if math.isnan(number):
            return None
        return str(int(number)) if abs(number) < _EXACT and number.is_integer() else repr(number)
    if isinstance(value, Decimal):
        return None if value.is_nan() else format(value, "f")
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return Foreign("binary")
    return Foreign(type(value).__name__)


def is_blank(cell: Cell) -> bool:
    """Whether nothing stands in a cell, or nothing but blanks."""
    return cell is None or (isinstance(cell, str) and not cell.strip())
