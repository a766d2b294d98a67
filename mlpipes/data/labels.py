"""A label column over all files of a table: what is missing, whether labels are classes or numbers, and which classes.

The rules, which docs/text.md shows as a table:

- Blanks around a label do not count. Nothing, or nothing but blanks, is a missing label.
- Where all else is numbers or truth values, `NA`, `NaN`, `null`, `None` and the like are missing; among words, they are
  words.
- A number is what is written with ASCII digits, a point and an exponent. If every label is one and some have a fraction,
  the task is regression; else every written form is a class of its own: `01` is not `1`, and `1E5` is not `10E4`.
- Only zeros after a point make no difference where all labels are numbers: `1.0` and `1` are the class `1` where both are
  there.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Literal

import numpy as np

from mlpipes.data.cells import Cell, Foreign
from mlpipes.data.table_roles import DATE, NUMBER
from mlpipes.errors import DataError

Task = Literal["classification", "regression"]
UNKNOWN_SHARE = 0.05
"""A test split with a greater share of labels that training does not have is refused."""
_MISSING = frozenset(
    (
        *("na", "n/a", "#n/a", "#n/a n/a", "#na", "nan", "-nan", "<na>", "null", "none"),
        *("1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan"),  # NaN as Windows wrote it
    )
)
_TRUTH = frozenset(("true", "false"))
_INFINITE = re.compile(r"[+-]?inf(inity)?", re.IGNORECASE)
_WHOLE = re.compile(r"(-?(?:0|[1-9]\d*))\.0*", re.ASCII)
_SHAPES = {
    "date": DATE,
    "time": re.compile(r"\d{1,2}:\d{2}(:\d{2}([.,]\d+)?)?"),
    "list": re.compile(r"\[.*\]", re.DOTALL),
    "object": re.compile(r"\{.*\}", re.DOTALL),
}
_SHOWN = 8


def written_labels(
    column: str, splits: Mapping[str, Sequence[Cell]], names: Sequence[str] | None
) -> dict[str, list[str | None]]:
    """The labels of each split as they are written, None where there is none.

    `names` are classes that the file or the user names; they are never taken for missing. Raises DataError for labels that
    are lists, dates and the like.
    """
    found: dict[str, list[str | None]] = {}
    for split, cells in splits.items():
        for row, cell in enumerate(cells, 1):
            if isinstance(cell, Foreign):
                raise _not_a_label(column, cell.kind, f"row {row} of {split}")
        found[split] = [cell.strip() or None if isinstance(cell, str) else None for cell in cells]
    known = _known(found)
    missing = {label for label in known if label.lower() in _MISSING} - set(names or ())
    rest = known - missing
    if missing and rest and (_are_numbers(rest) or {label.lower() for label in rest} <= _TRUTH):
        found = {split: [None if label in missing else label for label in labels] for split, labels in found.items()}
        known = rest
    if not names:
        if known and (infinite := [x for x in sorted(known) if _INFINITE.fullmatch(x)]) and _are_numbers(known):
            raise DataError(f"the label column {column!r} has {infinite[0]!r}: an infinite number is no label")
        for kind, shape in _SHAPES.items():
            if known and all(shape.fullmatch(label) for label in known):
                raise _not_a_label(column, kind, repr(min(known)))
    return found


def _not_a_label(column: str, kind: str, where: str) -> DataError:
    return DataError(
        f"the label column {column!r} holds values of type {kind} ({where}), which is neither class nor number. Name "
        "another column with label=…, or write what is meant as text"
    )


def _known(splits: Mapping[str, Iterable[str | None]]) -> set[str]:
    return {label for labels in splits.values() for label in labels if label is not None}


def _are_numbers(labels: Iterable[str]) -> bool:
    """Whether all labels are numbers, infinite ones among finite ones."""
    rest = [label for label in labels if not _INFINITE.fullmatch(label)]
    return bool(rest) and all(NUMBER.fullmatch(label) for label in rest)


def task_of(column: str, splits: Mapping[str, Sequence[str | None]]) -> Task:
    """Whether labels are classes or numbers. Raises DataError where most differ, as no classes do."""
    known = _known(splits)
    count = sum(label is not None for labels in splits.values() for label in labels)
    if known and _are_numbers(known) and any(not _is_whole(label) for label in known):
        return "regression"
    if count > 20 and len(known) > 0.5 * count:
        comma = all(re.fullmatch(r"-?\d*,\d+", label) for label in known)
        raise DataError(
            f"the label column {column!r} has {len(known):,} distinct values in {count:,} rows: it looks like no class. "
            + ("They look like numbers with a decimal comma: write a point. " if comma else "")
            + "Say task='classification' or 'regression', or choose another column with label=…"
        )
    return "classification"


def _is_whole(number: str) -> bool:
    value = Decimal(number)
    return value == value.to_integral_value()


def numbers(column: str, labels: Sequence[str | None]) -> list[float | None]:
    """Labels as numbers, None where one is missing. Raises DataError for what is none, or too large for one."""
    found: list[float | None] = []
    for row, label in enumerate(labels, 1):
        if label is None or label.lower() in _MISSING:
            found.append(None)
            continue
        if not NUMBER.fullmatch(label) or not np.isfinite(float(label)):
            raise DataError(f"the label {label!r} in column {column!r}, row {row}, is no finite number")
        found.append(float(label))
    known = [number for number in found if number is not None]
    with np.errstate(over="ignore"):
        if known and not np.isfinite(np.var(known)):
            raise DataError(
                f"the label column {column!r} has numbers too large to square, such as {max(known, key=abs)!r}"
            )
    return found


class Classes:
    """The classes of a label column, by name, and the number of each label."""

    def __init__(
        self,
        column: str,
        where: str,
        splits: Mapping[str, Sequence[str | None]],
        names: Sequence[str] | None,
        *,
        by_number: bool,
    ) -> None:
        """Training decides, with the written forms of all splits; or `names`, whose numbers `by_number` allows as labels.

        Raises DataError for fewer than two classes in training, and for labels in training that `names` lacks.
        """
        train = Counter(label for label in splits["train"] if label is not None)
        everywhere = _known(splits)
        merged = _merged(everywhere) if names is None else {}
        if len(found := {merged.get(label, label) for label in train}) < 2:
            raise DataError(f"{where}: column {column!r} has {len(found)} class ({', '.join(found)}); nothing to learn")
        if names is None:
            self.names = sorted(found, key=_by_value)
        else:
            self.names = list(names)
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self._numbers |= {label: self._numbers[name] for label, name in merged.items() if name in self._numbers}
        if names is not None and not everywhere & set(names):
            plain = {str(number): number for number in range(len(names))}
            forms = {label: match[1] for label in everywhere if (match := _WHOLE.fullmatch(label))}
            numbered = {label: plain.get(forms.get(label, label)) for label in everywhere}
            if by_number and all(numbered[label] is not None for label in train):
                self._numbers |= {label: number for label, number in numbered.items() if number is not None}
        if unknown := Counter({label: n for label, n in train.items() if label not in self._numbers}):
            raise DataError(
                f"{where}: column {column!r} has labels that are none of the classes {_listed(self.names)}: "
                f"{_counted(unknown)}"
            )

    def numbers(self, labels: Sequence[str | None]) -> list[int | None]:
        """The class numbers of a split's labels, None for what is none of the classes.

        Raises DataError if that is more than a few.
        """
        unknown = Counter(label for label in labels if label is not None and label not in self._numbers)
        count = sum(label is not None for label in labels)
        if unknown.total() > UNKNOWN_SHARE * count:
            raise DataError(
                f"{unknown.total():,} of {count:,} labels are unknown to training: {_counted(unknown)}. Training has "
                f"{_listed(self.names)}. Mend the labels, or name all classes: class_names=[…]"
            )
        return [None if label is None else self._numbers.get(label) for label in labels]


def _merged(labels: Iterable[str]) -> dict[str, str]:
    """The class names of labels by what is written: whole numbers with and without zeros after the point are one."""
    labels = list(labels)
    if not _are_numbers(labels):
        return {}
    forms = defaultdict(list)
    for label in labels:
        match = _WHOLE.fullmatch(label)
        forms[match[1] if match else label].append(label)
    return {label: name for name, several in forms.items() if len(several) > 1 for label in several}


def _by_value(name: str) -> tuple[int, Decimal, str]:
    return (0, Decimal(name), name) if NUMBER.fullmatch(name) else (1, Decimal(0), name)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _counted(labels: Counter[str]) -> str:
    shown = ", ".join(f"{label!r} ({count:,} rows)" for label, count in labels.most_common(_SHOWN))
    return shown + (f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else "")
