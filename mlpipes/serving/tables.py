"""Samples in files, a chunk at a time: Parquet, CSV and JSON lines for models of tables, arrays of NumPy for the others."""

import csv
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlpipes.errors import DataError
from mlpipes.serving.arrays import ArrayFile
from mlpipes.serving.signature import BadRequestError, Signature
from mlpipes.workloads.golden import Values

if TYPE_CHECKING:
    import pyarrow as pa

_BLOCK_BYTES = 32 << 20
"""Of a file are read at once; no row may be longer."""
_FORMATS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".ndjson": "json"}


@dataclass(frozen=True)
class Chunk:
    """Some consecutive samples of a file."""

    number: int
    first: int
    """The number of its first row in the file."""
    values: Values
    """As the model takes them, checked."""
    table: "pa.Table | None"
    """All columns of the file; None of an array."""

    def digest(self) -> str:
        """SHA-256 (hex) of the values, with their types and shapes."""
        sha = hashlib.sha256()
        for name, column in (self.values if isinstance(self.values, Mapping) else {"": self.values}).items():
            sha.update(f"{name!r} {column.dtype} {column.shape}\n".encode())
            if column.dtype == object:
                for text in column.tolist():
                    data = text.encode()
                    sha.update(len(data).to_bytes(8, "little") + data)
            else:
                sha.update(np.ascontiguousarray(column).data)
        return sha.hexdigest()


def check_kind(path: Path, signature: Signature) -> None:
    """Raises DataError where a file is not there, or holds nothing for such a model."""
    if not path.is_file():
        raise DataError(f"{path} is not there")
    wanted = (".npy",) if signature.is_tensor else tuple(_FORMATS)
    if path.suffix.lower() not in wanted:
        what = "an array" if signature.is_tensor else f"a table with {', '.join(c.name for c in signature.inputs)}"
        raise DataError(f"the model takes {what}: give a file that ends with {' or '.join(wanted)}, not {path.name}")
    if path.suffix.lower() == ".csv":
        _check_quotes(path)


def _check_quotes(path: Path) -> None:
    """Raises DataError where a quote is not closed: Arrow takes all that follows for one text."""
    lines = 0
    before = csv.field_size_limit(_BLOCK_BYTES)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            for _ in (reader := csv.reader(stream, strict=True)):
                lines = reader.line_num
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}, after line {lines:,}: {error}") from error
    finally:
        csv.field_size_limit(before)


def _columns_of(path: Path) -> int:
    """How many columns a CSV file names."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return len(next(csv.reader(stream), []))


def rows_in(path: Path) -> int | None:
    """How many samples a file has, where that is known without reading it."""
    if path.suffix.lower() == ".npy":
        return ArrayFile.of(path).shape[0]
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(path).metadata.num_rows
        except Exception as error:  # of Arrow, which has many
            raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    return None


def chunks(path: Path, signature: Signature, rows: int) -> Iterator[Chunk]:
    """The samples of a file, so many at a time, in order and in bounded memory.

    Raises DataError for what cannot be read, or is not what the model takes, with the rows that it is in.
    """
    number = first = 0
    for values, table in _read(path, signature, rows):
        count = len(values if table is None else table)
        try:
            checked: Values
            if signature.is_tensor:
                checked = signature.check_array(values, "samples")
            else:
                checked = signature.check_table(values, "columns")
        except BadRequestError as error:
            raise DataError(f"{path}, rows {first} to {first + count - 1}: {error}") from error
        yield Chunk(number, first, checked, table)
        number, first = number + 1, first + count


def _read(path: Path, signature: Signature, rows: int) -> Iterator[tuple[Any, "pa.Table | None"]]:
    if signature.is_tensor:
        for values in ArrayFile.of(path).rows(rows):
            yield values, None
        return
    for table in _tables(path, signature, rows):
        wanted = [column.name for column in signature.inputs if column.name in table.column_names]
        yield {name: table[name].to_pylist() for name in wanted}, table


def _tables(path: Path, signature: Signature, rows: int) -> Iterator["pa.Table"]:
    import pyarrow as pa
    import pyarrow.csv as pa_csv
    import pyarrow.dataset as pa_dataset
    import pyarrow.json as pa_json

    kind: Any = _FORMATS[path.suffix.lower()]
    # What looks like a number, a date, or like nothing, is a text where the model takes texts.
    texts = {column.name: pa.string() for column in signature.inputs if column.dtype == "str"}
    if kind == "json":
        known = pa_json.ParseOptions(explicit_schema=pa.schema(list(texts.items())))
        kind = pa_dataset.JsonFileFormat(parse_options=known, read_options=pa_json.ReadOptions(block_size=_BLOCK_BYTES))
    if kind == "csv":
        scan = pa_dataset.CsvFragmentScanOptions(
            convert_options=pa_csv.ConvertOptions(column_types=texts, strings_can_be_null=False),
            read_options=pa_csv.ReadOptions(block_size=_BLOCK_BYTES),
        )
        # An empty line is an empty text where there is one column, and nothing where there are more.
        parse = pa_csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=_columns_of(path) > 1)
        kind = pa_dataset.CsvFileFormat(parse_options=parse, default_fragment_scan_options=scan)
    try:
        batches = pa_dataset.dataset(path, format=kind).scanner().to_batches()
        waiting: list[pa.RecordBatch] = []
        count = 0
        for batch in batches:
            waiting.append(batch)
            count += len(batch)
            while count >= rows:
                table = pa.Table.from_batches(waiting)
                yield table.slice(0, rows)
                waiting, count = table.slice(rows).to_batches(), count - rows
        if count:
            yield pa.Table.from_batches(waiting)
    except (pa.ArrowException, OSError) as error:  # a damaged page is an OSError
        raise DataError(f"{path} cannot be read: {error}") from error
