"""What travels: MLflow's JSON formats and CSV for `/invocations`, and the Open Inference Protocol's version 2."""

import csv
import io
import json
import math
import re
from collections.abc import Mapping
from itertools import islice
from typing import Any, NoReturn

import numpy as np

from mlpipes.serving.signature import MOST_ROWS, BadRequestError, Signature, as_array, check_kinds, in_json
from mlpipes.workloads.golden import Values

_MLFLOW = ("inputs", "instances", "dataframe_split", "dataframe_records")
_DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float32": "FP32",
    "float64": "FP64",
    "str": "BYTES",
    "object": "BYTES",
}
"""NumPy's types, and what the protocol calls them."""
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d{1,3})?", re.ASCII)


_MOST_DIGITS = 400
"""Of a whole number: more than the largest float has."""
_AROUND = 1000
"""Lists and objects that are around samples."""
_FREE_LISTS = 100_000
"""Lists in a request whose samples have no certain shape: pictures have one for each row of pixels."""


def parsed(body: bytes, signature: Signature) -> Any:
    """A JSON value of not more lists than samples are written with: millions are made while everybody else waits.

    Raises BadRequestError for what is none, and for NaN, which JSON does not have.
    """
    most = _most_lists(signature)
    if _lists(body) > most and _lists(_without_texts(body)) > most:
        raise BadRequestError("body", f"more lists are in it than {MOST_ROWS:,} samples are written with")

    def none(name: str) -> NoReturn:
        raise BadRequestError("body", f"{name} is no number in JSON")

    try:
        # Of UTF-16, which Python would take, lists were counted as what they are not.
        return json.loads(body.decode("utf-8-sig"), parse_constant=none)
    except (ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadRequestError("body", f"JSON in UTF-8 is wanted: {said[:200]}") from None


def _without_texts(body: bytes) -> bytes:
    """What is not in strings; no regular expression, whose stack would have gigabytes for a long one."""
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
    return b"".join(unescaped.split(b'"')[::2])


def _lists(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{")


def _most_lists(signature: Signature) -> int:
    """Of a request with as many samples as are taken at once, in the format that takes most of them."""
    if not signature.same_shapes:
        return _FREE_LISTS
    of_sample = [
        sum(math.prod(column.shape[:depth]) for depth in range(len(column.shape))) for column in signature.inputs
    ]
    return MOST_ROWS * (1 + sum(of_sample)) + _AROUND


# -- MLflow ------------------------------------------------------------------------------------------------------------
def of_mlflow(body: Any, signature: Signature) -> Values:
    """Checked samples of an MLflow request. Raises BadRequestError."""
    if not isinstance(body, dict):
        raise BadRequestError("body", f"an object with one of {', '.join(_MLFLOW)} is wanted")
    given = [name for name in _MLFLOW if name in body]
    if len(given) != 1 or set(body) - {*_MLFLOW, "params"}:
        found = ", ".join(key[:40] for key in islice(body, 5)) or "nothing"
        raise BadRequestError("body", f"exactly one of {', '.join(_MLFLOW)} is wanted, and nothing else; found {found}")
    if body.get("params"):
        raise BadRequestError("params", "the model takes none")
    name = given[0]
    value = body[name]
    if signature.is_tensor:
        if name.startswith("dataframe"):
            raise BadRequestError(name, "the model takes an array: send it as `inputs`")
        return signature.check_array(_listed(value, name), name)
    return signature.check_table(_table(name, value), name)


def _listed(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadRequestError(field, "a list of samples is wanted")
    return value


def _table(name: str, value: Any) -> Mapping[str, Any]:
    """Columns, of whichever way a table was written."""
    if name == "dataframe_split":
        if not isinstance(value, dict) or not {"columns", "data"} <= set(value) <= {"columns", "data", "index"}:
            raise BadRequestError(name, "an object with `columns` and `data` is wanted")
        columns, data = _listed(value["columns"], f"{name}.columns"), _listed(value["data"], f"{name}.data")
        if not all(isinstance(column, str) for column in columns) or len(set(columns)) != len(columns):
            raise BadRequestError(f"{name}.columns", "names, each once, are wanted")
        for number, row in enumerate(data):
            if not isinstance(row, list) or len(row) != len(columns):
                raise BadRequestError(f"{name}.data[{number}]", f"a list of {len(columns)} values is wanted")
        return {column: [row[at] for row in data] for at, column in enumerate(columns)}
    if isinstance(value, dict):
        return {column: _listed(values, f"{name}.{column}") for column, values in value.items()}
    records = _listed(value, name)
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise BadRequestError(f"{name}[{number}]", "an object with a value for each column is wanted")
        if set(record) != set(records[0]):
            raise BadRequestError(f"{name}[{number}]", "its columns are not those of the first")
    return {column: [record[column] for record in records] for column in (records[0] if records else {})}


def of_csv(body: bytes, signature: Signature) -> Values:
    """Checked samples of a CSV with a header. Raises BadRequestError."""
    if signature.is_tensor:
        raise BadRequestError("body", "the model takes an array, which CSV cannot hold: send JSON with `inputs`")
    try:
        rows = list(csv.reader(io.StringIO(body.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadRequestError("body", f"CSV in UTF-8 is wanted: {error}") from None
    if not rows:
        raise BadRequestError("body", "a line with the names of the columns is wanted")
    head, data = rows[0], [row for row in rows[1:] if row]
    table = _table("dataframe_split", {"columns": head, "data": data})
    types = {column.name: column.dtype for column in signature.inputs}
    return signature.check_table(
        {name: [_cell(text, types.get(name, "str"), name) for text in cells] for name, cells in table.items()}, "body"
    )


def _cell(text: str, dtype: str, column: str) -> Any:
    if dtype == "str":
        return text
    if dtype == "bool":
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise BadRequestError(f"body.{column}", f"{text[:40]!r} is neither true nor false")
    if len(text) > _MOST_DIGITS or not _NUMBER.fullmatch(text):  # Python takes `1_0` and the digits of all scripts
        raise BadRequestError(f"body.{column}", f"{text[:40]!r} is no number ({dtype})")
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)


def to_mlflow(answer: Values) -> dict[str, Any]:
    """An answer as MLflow's servers write it."""
    if isinstance(answer, np.ndarray):
        return {"predictions": answer.tolist()}
    columns = {name: np.asarray(values).tolist() for name, values in answer.items()}
    return {"predictions": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]}


# -- Open Inference Protocol ---------------------------------------------------------------------------------------------
def of_protocol(body: Any, signature: Signature) -> Values:
    """Checked samples of an inference request. Raises BadRequestError."""
    if not isinstance(body, dict) or not isinstance(body.get("inputs"), list) or not body["inputs"]:
        raise BadRequestError("inputs", "a list of tensors is wanted")
    tensors: dict[str, np.ndarray] = {}
    for number, given in enumerate(body["inputs"]):
        name, array = _tensor(given, f"inputs[{number}]", signature)
        if name in tensors:
            raise BadRequestError(f"inputs[{number}].name", f"{name[:40]!r} occurs twice")
        tensors[name] = array
    if signature.is_tensor:
        if len(tensors) != 1:
            raise BadRequestError("inputs", f"the model takes one tensor, not {len(tensors)}")
        return signature.check_array(next(iter(tensors.values())), "inputs[0].data")
    return signature.check_table(tensors, "inputs")


def _tensor(given: Any, field: str, signature: Signature) -> tuple[str, np.ndarray]:
    if not isinstance(given, dict) or not {"name", "shape", "datatype", "data"} <= set(given):
        raise BadRequestError(field, "an object with name, shape, datatype and data is wanted")
    name, shape, datatype = given["name"], given["shape"], given["datatype"]
    if not isinstance(name, str):
        raise BadRequestError(f"{field}.name", "a text is wanted")
    column = signature.inputs[0] if signature.is_tensor else next((c for c in signature.inputs if c.name == name), None)
    if column is None:
        known = ", ".join(each.name for each in signature.inputs)
        raise BadRequestError(f"{field}.name", f"there is no input {name[:40]!r}; the model has {known}")
    if datatype != (wanted := _DATATYPES[column.dtype]):
        said = repr(datatype[:40]) if isinstance(datatype, str) else in_json(datatype)
        raise BadRequestError(f"{field}.datatype", f"{wanted} is wanted, not {said}")
    # Not `isinstance`: true is an int in Python.
    if not isinstance(shape, list) or not shape or not all(type(side) is int and 0 < side < 1 << 32 for side in shape):
        raise BadRequestError(f"{field}.shape", "a list of positive whole numbers is wanted")
    try:
        data = as_array(_listed(given["data"], f"{field}.data"), numbers=column.dtype not in ("str", "bool"))
    except ValueError:
        raise BadRequestError(f"{field}.data", "the lists in it are of different lengths") from None
    if len(shape) != 1 + len(column.shape):
        raise BadRequestError(f"{field}.shape", f"{1 + len(column.shape)} lengths are wanted, not {len(shape)}")
    if column.dtype not in ("str", "bool"):
        check_kinds(given["data"], data.ndim, f"{field}.data")
    count = math.prod(shape)
    if data.size != count:
        raise BadRequestError(f"{field}.data", f"{data.size:,} values are there, the shape says {count:,}")
    if data.ndim > 1 and data.shape != tuple(shape):
        raise BadRequestError(f"{field}.data", f"it is nested as {data.shape}, the shape says {tuple(shape)}")
    return name, data.reshape(shape)


def to_protocol(answer: Values) -> list[dict[str, Any]]:
    """An answer as the protocol's outputs."""
    columns = {"output-0": answer} if isinstance(answer, np.ndarray) else answer
    return [
        {
            "name": name,
            "datatype": _DATATYPES.get(str(np.asarray(values).dtype), "BYTES"),
            "shape": list(np.shape(values)),
            "data": np.asarray(values).ravel().tolist(),
        }
        for name, values in columns.items()
    ]


def described(signature: Signature) -> dict[str, Any]:
    """Inputs and outputs as the protocol's model metadata have them."""

    def tensors(columns: Any, kind: str) -> list[dict[str, Any]]:
        return [
            {
                "name": column.name or f"{kind}-{number}",
                "datatype": _DATATYPES[column.dtype],
                "shape": [-1, *column.shape],
            }
            for number, column in enumerate(columns)
        ]

    return {"inputs": tensors(signature.inputs, "input"), "outputs": tensors(signature.outputs, "output")}
