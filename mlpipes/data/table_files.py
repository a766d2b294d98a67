"""Files of tables, packed or not, as columns of text: csv, tsv, JSON and Parquet; encodings; what is no table is said."""

import codecs
import gzip
import io
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlpipes.data.cells import Cell, Foreign, RawTable, cell_of
from mlpipes.data.delimited import read_delimited
from mlpipes.errors import DataError

_DELIMITED = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
_JSON = (".jsonl", ".ndjson", ".json")
READABLE = (*_DELIMITED, *_JSON, ".parquet")
_MARKS = (  # those of UTF-32 begin like those of UTF-16
    (b"\xff\xfe\x00\x00", "utf-32"), (b"\x00\x00\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
)  # fmt: skip
_PACKED = {b"PK\x03\x04": "zip (or an Excel sheet)", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Reading:
    """What a user says about how files are to be read."""

    delimiter: str | None = None
    quoting: bool | None = None
    encoding: str | None = None
    columns: Sequence[str] | None = None
    roles: Sequence[str] = field(default=())
    """Columns that the user has named: a header that has them is a header."""


def read_table(path: Path, reading: Reading) -> RawTable:
    """A table as columns of text. Raises DataError naming the file, and the line where there is one."""
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise DataError(f"{path}: {error}") from error
    if os.path.isdir(path):  # noqa: PTH112 - of a name that is too long, `Path.is_dir` raises
        raise DataError(f"{path} is a folder; name the file in it")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffix = next(iter([s for s in suffixes if s != ".gz"][-1:]), "")
    if suffix not in READABLE:
        raise DataError(f"{path} has an unknown type; known are {', '.join(READABLE)}, each also packed as .gz")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} cannot be unpacked: {error}. Is it complete?") from error
    elif suffixes[-1] == ".gz":
        raise DataError(f"{path} is named .gz, but is not packed with gzip")
    if packed := next((kind for mark, kind in _PACKED.items() if data.startswith(mark)), None):
        raise DataError(f"{path} is packed as {packed}; unpack it, or save it as csv or with gzip")
    if not data:
        raise DataError(f"{path} is empty")
    if suffix not in _DELIMITED and (reading.delimiter or reading.quoting is not None or reading.columns is not None):
        raise DataError(
            f"delimiter=, quoting= and columns= are for delimited text ({', '.join(_DELIMITED)}), not {path}"
        )
    if suffix == ".parquet":
        return _parquet(data, path)
    encoding = _encoding(data, path, reading.encoding)
    if suffix in _JSON:
        rows = _json_rows(data.decode(encoding), path)
        return RawTable(_columns_of(rows), {}, f"JSON, {encoding}")
    columns, how = read_delimited(
        data,
        encoding,
        str(path),
        default=_DELIMITED[suffix],
        delimiter=reading.delimiter,
        quoting=reading.quoting,
        columns=reading.columns,
        roles=reading.roles,
    )
    return RawTable(dict(columns), {}, f"{how}, {encoding}")


def _encoding(data: bytes, path: Path, named: str | None) -> str:
    """The encoding that a file's first bytes tell, the one that is named, or UTF-8; it fits every byte. Raises DataError."""
    marked = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), None)
    encoding = marked or named or "utf-8"
    try:
        if marked and named and _codec(named) not in _codec(marked):
            raise DataError(f"{path} begins with the mark of {marked}, but encoding={named!r} is given; leave it out")
        if (
            not marked
            and named
            and _codec(named) in ("utf-16", "utf-32")
            and _codec(named) == codecs.lookup(named).name
        ):
            raise DataError(f"{path} has no mark of byte order; say encoding='{named}-le' or '{named}-be'")
        head = data.decode(encoding)[:4096]
    except LookupError as error:
        raise DataError(f"encoding={named!r} is no encoding that Python knows; cp1252 and utf-16-le are") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path} is not {encoding}: line {line} has the bytes {data[error.start : error.start + 4]!r}. Say "
            "encoding='cp1252' (Western Windows), 'latin-1' or what it was saved with; or save it as UTF-8"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is not {encoding}: {error}. Say another encoding=…, or save it as UTF-8") from error
    if "\0" in head.partition("\n")[0]:
        raise DataError(
            f"{path} has zero bytes in its first line: it looks like UTF-16 without a mark. Say encoding='utf-16-le' or "
            "'utf-16-be'; or save it as UTF-8"
        )
    return encoding


def _codec(encoding: str) -> str:
    """The canonical name of an encoding, without its byte order."""
    return codecs.lookup(encoding).name.removesuffix("-le").removesuffix("-be")


def _json_rows(text: str, path: Path) -> list[dict[str, Any]]:
    """The objects of a file: one a line, an array of them, or one that holds columns or a single such array."""
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise DataError(f"{path} is empty")
    if text.lstrip()[0] == "[":
        return _objects(_parsed(text, path, None), path)
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(_parsed(line, path, number))
            except DataError:
                if rows or {".jsonl", ".ndjson"} & {suffix.lower() for suffix in path.suffixes}:
                    raise
                rows = [_parsed(text, path, None)]  # one object over several lines
                break
    return _unwrapped(rows[0], path) if len(rows) == 1 and isinstance(rows[0], dict) else _objects(rows, path)


def _parsed(text: str, path: Path, line: int | None) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"it has the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
        return found

    where = f"{path}{f', line {line}' if line else ''}"
    try:
        # Numbers stay as they are written.
        return json.loads(
            text,
            parse_int=str,
            parse_float=str,
            parse_constant=lambda word: None if word == "NaN" else word,
            object_pairs_hook=once,
        )
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error


def _objects(rows: Any, path: Path) -> list[dict[str, Any]]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}: row {number} is no JSON object with a value for each column, but {str(row)[:60]!r}"
            )
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def _unwrapped(found: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The rows of a lone object: those of the one array in it, or those of its columns (lists, or objects by row)."""
    values = list(found.values())
    lists = [value for value in values if isinstance(value, list)]
    tables = [value for value in lists if value and isinstance(value[0], dict)]
    if len(lists) == len(values) > max(1, len(tables)) and len({len(value) for value in lists}) == 1:
        columns = values
    elif len(values) > 1 and all(isinstance(value, dict) and list(value) == list(values[0]) for value in values):
        columns = [list(value.values()) for value in values]
    elif len(tables) == 1:
        return _objects(tables[0], path)
    elif tables:
        raise DataError(
            f"{path} holds several tables ({', '.join(map(repr, found))}); save the one that is meant alone"
        )
    else:
        return [found]
    return _objects([dict(zip(found, row, strict=True)) for row in zip(*columns, strict=True)], path)


def _columns_of(rows: list[dict[str, Any]]) -> dict[str, Sequence[Cell]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [_json_cell(row.get(name)) for row in rows] for name in names}


def _json_cell(value: Any) -> Cell:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | dict):
        return Foreign("list" if isinstance(value, list) else "object")
    return value


def _parquet(data: bytes, path: Path) -> RawTable:
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(io.BytesIO(data)).read()
    except Exception as error:
        raise DataError(f"{path} cannot be read as parquet: {type(error).__name__}: {str(error)[:300]}") from error
    try:
        features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        classes = {
            name: f["names"] for name, f in features.items() if f.get("_type") == "ClassLabel" and f.get("names")
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        classes = {}
    return arrow_table(table, classes, str(path))


def arrow_table(table: Any, classes: dict[str, list[str]], where: str) -> RawTable:
    """The columns of an Arrow table; those of class numbers (`classes`: the names by column) become names, and −1 missing.

    Raises DataError for doubled columns and numbers without a name.
    """
    from pyarrow import ArrowException, types

    names = list(table.column_names)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(
            f"{where}: the columns {', '.join(map(repr, twice))} are there twice; give every one its own name"
        )
    if not table.num_rows:
        raise DataError(f"{where} has columns ({', '.join(map(repr, names))}), but no rows")
    columns = {}
    for name in names:
        try:
            columns[name] = _arrow_cells(table.column(name))
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: column {name!r} holds texts that are not UTF-8: {error}") from error
        except ArrowException as error:  # a broken file: numbers of a dictionary that it has no entries for
            raise DataError(f"{where}: column {name!r} cannot be read: {error}") from error
    named = {}
    for name, known in classes.items():
        if name not in columns:
            continue
        if not all(isinstance(one, str) and one.strip() for one in known) or len({*map(str.strip, known)}) < len(known):
            raise DataError(f"{where}: the classes of column {name!r} are to be texts, each once, but are {known!r}")
        named[name] = [one.strip() for one in known]
        # Names may be digits: what a number is, its column's type says.
        numbered = types.is_integer(kind := _kind_of(table.column(name))) or types.is_floating(kind)
        columns[name] = [_class_name(cell, named[name], numbered, name, where) for cell in columns[name]]
    return RawTable(dict(columns), named, "typed")


def _class_name(cell: Cell, known: list[str], numbered: bool, column: str, where: str) -> Cell:
    if isinstance(cell, str) and not numbered and cell.strip() in known:
        return cell
    if cell is None or cell == "-1":
        return None
    if isinstance(cell, str) and cell.isascii() and cell.isdecimal() and int(cell) < len(known):
        return known[int(cell)]
    raise DataError(f"{where}: column {column!r} has {cell!r}, but its {len(known)} classes are numbered from 0")


def _kind_of(column: Any) -> Any:
    """The type of a column's values."""
    from pyarrow import types

    return column.type.value_type if types.is_dictionary(column.type) else column.type


def _arrow_cells(column: Any) -> list[Cell]:
    from pyarrow import types

    kind = _kind_of(column)
    plain = (
        types.is_string, types.is_large_string, types.is_string_view, types.is_integer, types.is_floating, types.is_boolean,
        types.is_decimal, types.is_null, types.is_binary, types.is_large_binary, types.is_binary_view,
    )  # fmt: skip
    if any(is_kind(kind) for is_kind in plain):
        return [cell_of(value) for value in column.to_pylist()]
    # Not converted: a time may need a time zone that is not installed, and no one reads it.
    return [Foreign(str(kind)) if valid else None for valid in column.is_valid().to_pylist()]
