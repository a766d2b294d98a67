"""What a model takes and gives, and strict checks of what it is sent: nothing is cast, cut or filled in silently."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlpipes.errors import UserError
from mlpipes.workloads.golden import Values

MOST_ROWS = 4096
"""Samples of one request."""
_TYPES = {
    "string": "str",
    "boolean": "bool",
    "integer": "int32",
    "long": "int64",
    "float": "float32",
    "double": "float64",
}
"""MLflow's column types that are served, and what they are in NumPy."""
_NUMBERS = {int, float}
_IN_JSON = {
    type(None): "null",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    **dict.fromkeys(_NUMBERS, "a number"),
}


class BadRequestError(UserError):
    """A request that cannot be answered: which field is wrong, and the rule that it breaks."""

    def __init__(self, field: str, rule: str) -> None:
        super().__init__(f"{field}: {rule}" if field else rule)
        self.field = field


@dataclass(frozen=True)
class Column:
    """A tensor, or a column of a table."""

    name: str
    """Empty for a tensor without one."""
    dtype: str
    """NumPy's name of it; `str` for texts."""
    shape: tuple[int, ...]
    """Of one sample; -1 where the length is free."""


@dataclass(frozen=True)
class Signature:
    """What a registered model takes and gives, as MLflow has it."""

    inputs: tuple[Column, ...]
    outputs: tuple[Column, ...]
    is_tensor: bool
    """One array in, rather than a table."""
    answers_tensor: bool

    @classmethod
    def of(cls, signature: Any) -> "Signature":
        """Read MLflow's. Raises UserError for types that are not served."""
        if signature is None or signature.inputs is None or signature.outputs is None:
            raise UserError("the model was registered without a signature: what it takes cannot be checked")
        (inputs, tensor), (outputs, answers) = _columns(signature.inputs), _columns(signature.outputs)
        return cls(inputs, outputs, tensor, answers)

    @property
    def same_shapes(self) -> bool:
        """Whether all samples have one shape."""
        return all(-1 not in column.shape for column in self.inputs)

    def check_array(self, given: Any, field: str) -> np.ndarray:
        """Samples as an array of the model's type. Raises BadRequestError."""
        (column,) = self.inputs
        return _checked(given, column, field)

    def check_table(self, given: Mapping[str, Any], field: str) -> dict[str, np.ndarray]:
        """Samples as columns of the model's types, in its order. Raises BadRequestError."""
        wanted = [column.name for column in self.inputs]
        for name in given:
            if name not in wanted:
                known = ", ".join(wanted)
                raise BadRequestError(f"{field}.{name[:40]}", f"there is no such column; the model has {known}")
        for name in wanted:
            if name not in given:
                raise BadRequestError(f"{field}.{name}", "the column is missing")
        found = {column.name: _checked(given[column.name], column, f"{field}.{column.name}") for column in self.inputs}
        if len(lengths := {name: len(values) for name, values in found.items()}) and len(set(lengths.values())) > 1:
            said = ", ".join(f"{name} {count}" for name, count in lengths.items())
            raise BadRequestError(field, f"columns must be of one length, not {said}")
        return found


def rows_of(values: Values) -> int:
    """How many samples, or answers, there are."""
    return len(values) if isinstance(values, np.ndarray) else len(next(iter(values.values())))


def cut(values: Values, start: int, stop: int) -> Values:
    """Some of them."""
    if isinstance(values, np.ndarray):
        return values[start:stop]
    return {name: column[start:stop] for name, column in values.items()}


def taken(values: Values, rows: np.ndarray) -> Values:
    """Those of some rows."""
    if isinstance(values, np.ndarray):
        return values[rows]
    return {name: np.asarray(column)[rows] for name, column in values.items()}


def joined(several: Sequence[Values]) -> Values:
    """Those of several requests, one after the other."""
    first = several[0]
    if len(several) == 1:
        return first
    if isinstance(first, np.ndarray):
        return np.concatenate([values for values in several if isinstance(values, np.ndarray)])
    return {name: np.concatenate([np.asarray(values[name]) for values in several]) for name in first}  # pyright: ignore[reportCallIssue, reportArgumentType]


def _columns(schema: Any) -> tuple[tuple[Column, ...], bool]:
    if schema.is_tensor_spec():
        if len(schema.inputs) != 1:
            raise UserError(f"the model takes or gives {len(schema.inputs)} tensors; one is served")
        (spec,) = schema.inputs
        return (Column(spec.name or "", str(spec.type), tuple(spec.shape[1:])),), True
    found = []
    for spec in schema.inputs:
        kind = getattr(spec.type, "name", str(spec.type))
        if kind not in _TYPES:
            raise UserError(f"column {spec.name!r} is of type {kind}, which is not served; {', '.join(_TYPES)} are")
        found.append(Column(str(spec.name), _TYPES[kind], ()))
    return tuple(found), False


def _checked(given: Any, column: Column, field: str) -> np.ndarray:
    try:
        raw = given if isinstance(given, np.ndarray) else as_array(given, numbers=bool(column.shape))
    except ValueError:
        raise BadRequestError(field, "the lists in it are of different lengths") from None
    if raw.ndim != 1 + len(column.shape) or any(
        wanted not in (-1, length) for wanted, length in zip(column.shape, raw.shape[1:], strict=True)
    ):
        shape = ", ".join("any" if length == -1 else str(length) for length in ("n", *column.shape))
        raise BadRequestError(field, f"the shape ({shape}) is wanted, and {raw.shape} was given")
    if not 1 <= len(raw) <= MOST_ROWS:
        raise BadRequestError(field, f"1 to {MOST_ROWS:,} samples at once, not {len(raw):,}")
    if 0 in raw.shape:
        raise BadRequestError(field, f"nothing is in samples of the shape {raw.shape[1:]}")
    if column.dtype == "str":
        return _texts(raw, field)
    if isinstance(given, list) and column.shape:  # NumPy takes `[true, 2]` for numbers
        check_kinds(given, raw.ndim, field)
    return _numbers(raw, np.dtype(column.dtype), field)


def as_array(given: list[Any], *, numbers: bool) -> np.ndarray:
    """Lists as NumPy has them; of objects where not only numbers are wanted, or are there.

    Of texts NumPy would make places that are all as wide as the longest: gigabytes of a small request.
    Raises ValueError for numbers in lists of different lengths.
    """
    return np.asarray(given, dtype=None if numbers and not _has_text(given) else object)


def _has_text(nested: list[Any]) -> bool:
    waiting = [nested]
    while waiting:
        values = waiting.pop()
        kinds = set(map(type, values))
        if str in kinds:
            return True
        if list in kinds:
            waiting.extend(inner for inner in values if type(inner) is list)
    return False


def check_kinds(nested: Any, depth: int, field: str) -> None:
    """Raises BadRequestError with the place of the first value in lists, so deep, that is no number of JSON."""
    if depth > 1:
        for place, inner in enumerate(nested):
            check_kinds(inner, depth - 1, f"{field}[{place}]")
    elif set(map(type, nested)) - _NUMBERS:
        place = next(place for place, value in enumerate(nested) if type(value) not in _NUMBERS)
        raise BadRequestError(f"{field}[{place}]", f"a number is wanted, not {in_json(nested[place])}")


def in_json(value: Any) -> str:
    """What a value is called in JSON."""
    return _IN_JSON.get(type(value), type(value).__name__)


def _texts(raw: np.ndarray, field: str) -> np.ndarray:
    for number, value in enumerate(raw.tolist()):
        if not isinstance(value, str):
            raise BadRequestError(f"{field}[{number}]", f"a text is wanted, not {in_json(value)}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRequestError(f"{field}[{number}]", "a half of a character (a surrogate) is no text") from None
    return raw.astype(object)


def _numbers(raw: np.ndarray, dtype: np.dtype, field: str) -> np.ndarray:
    if raw.dtype == object:  # a column, or numbers that no machine type holds
        kinds = {type(value) for value in raw.ravel().tolist()}
        wanted: set[type] = {bool} if dtype.kind == "b" else _NUMBERS
        if kinds - wanted:
            at, value = next((at, value) for at, value in np.ndenumerate(raw) if type(value) not in wanted)
            said = "true or false" if dtype.kind == "b" else "a number"
            raise BadRequestError(f"{field}{_address(at)}", f"{said} is wanted, not {in_json(value)}")
        try:
            raw = raw.astype(bool if dtype.kind == "b" else np.float64 if float in kinds else np.int64)
        except OverflowError:
            at = next(at for at, value in np.ndenumerate(raw) if abs(value) > np.iinfo(np.int64).max)
            raise BadRequestError(f"{field}{_address(at)}", f"this number is too large for {dtype}") from None
    if dtype.kind == "b":
        if raw.dtype.kind != "b":
            raise BadRequestError(field, f"true or false are wanted, not {raw.dtype}")
        return raw
    if raw.dtype.kind not in "iuf":
        raise BadRequestError(field, f"numbers are wanted, not {'texts' if raw.dtype.kind in 'US' else raw.dtype}")
    if raw.dtype.kind == "f" and not np.isfinite(raw).all():
        raise BadRequestError(field, "NaN and infinity are no numbers here")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        bad = (
            (raw < limits.min)
            | (raw > limits.max)
            | (
                # From there on, floats skip whole numbers: which one was meant is not known.
                (raw != np.trunc(raw)) | (np.abs(raw) >= 2.0**53) if raw.dtype.kind == "f" else False
            )
        )
        if bad.any():
            rule = f"{raw[bad][0]} is no whole number from {limits.min} to {limits.max} ({dtype})"
            raise BadRequestError(f"{field}{_address(np.argwhere(bad)[0])}", rule)
        return raw.astype(dtype)
    if float(np.abs(raw).max()) > np.finfo(dtype).max:
        raise BadRequestError(field, f"a number is too large for {dtype}")
    return raw.astype(dtype)


def _address(place: Iterable[int]) -> str:
    return "".join(f"[{number}]" for number in place)


def is_finite(values: Values) -> bool:
    """Whether an answer can be written as JSON."""
    columns = [values] if isinstance(values, np.ndarray) else list(values.values())
    return all(
        np.isfinite(column).all() if column.dtype.kind == "f" else not _odd(column)
        for column in map(np.asarray, columns)
    )


def _odd(column: np.ndarray) -> bool:
    return column.dtype == object and any(isinstance(v, float) and not math.isfinite(v) for v in column.tolist())
