"""Delimited text (csv, tsv): the one reading in which every row fits the header, or an error that names the line.

A file says neither its delimiter nor whether its quotes are quotes. Every delimiter in question is tried with quotes that
wrap cells and with quotes that are only characters, strictly, and what does not fit is no reading. Nothing is repaired.
"""

import csv
import io
import re
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from mlpipes.data.table_roles import DATE, NUMBER, known_name
from mlpipes.errors import DataError

DELIMITERS = (",", ";", "\t", "|")
_NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_ROW_NAMES_FROM = 5
"""So many rows must be numbered for a header that is one name short to be one of R's."""


@dataclass
class _Reading:
    """A way to read a file in which every row has as many cells as the header."""

    delimiter: str
    quoted: bool
    header: list[str]
    rows: list[list[str]]
    lines: array
    """The line that each row begins in."""

    @property
    def how(self) -> str:
        quotes = "quotes wrap cells" if self.quoted else "quotes are characters"
        return f"delimiter {_NAMES.get(self.delimiter, repr(self.delimiter))}, {quotes}"


class _MisfitError(Exception):
    """Why a file cannot be read in some way, and how many rows fitted until then."""

    def __init__(self, message: str, fitted: int) -> None:
        super().__init__(message)
        self.fitted = fitted


def read_delimited(
    data: bytes,
    encoding: str,
    name: str,
    *,
    default: str,
    delimiter: str | None,
    quoting: bool | None,
    columns: Sequence[str] | None,
    roles: Sequence[str],
) -> tuple[dict[str, list[str]], str]:
    """The columns of a delimited text by name, and how it was read.

    `default` is the delimiter that the file's name stands for; `columns` names those of a file without a header; `roles`
    are names that the user has given to columns. Raises DataError naming the line.
    """
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise DataError(f"delimiter={delimiter!r}: it must be one character, and no quote or end of line")
    tried = [delimiter] if delimiter else [default, *(d for d in DELIMITERS if d != default)]
    modes = [quoting] if quoting is not None else [True, False] if '"'.encode(_bare(encoding)) in data else [True]
    found: list[_Reading] = []
    misfits: dict[tuple[str, bool], _MisfitError] = {}
    with _long_cells():
        for candidate in tried:
            for quoted in modes:
                try:
                    found.append(_parse(data, encoding, candidate, quoted, columns))
                except _MisfitError as misfit:
                    misfits[candidate, quoted] = misfit
    if not found:
        # The one that came furthest was meant; of equals, the file name's own and quotes.
        hint = " Are quotes only characters? Say quoting=False." if len(modes) > 1 else ""
        raise DataError(f"{name}: {max(misfits.values(), key=lambda misfit: misfit.fitted)}{hint}")
    reading = _the_reading(found, name, quoting)
    if quoting is None and not reading.quoted and _has_wrapped_cells(reading):
        raise DataError(
            f"{name}: quotes seem to wrap cells, but {misfits[reading.delimiter, True]} Say quoting=False if they are only "
            "characters."
        )
    header = _header(reading, name, columns, roles)
    if not reading.rows:
        raise DataError(f"{name} has a header ({', '.join(map(repr, header))}), but no rows")
    found_columns: dict[str, list[str]] = {}
    for place, title in enumerate(header):
        cells = [row[place] for row in reading.rows]
        if title:
            found_columns[title] = cells
        else:
            _assert_nothing_of_interest(cells, place, reading, name)
    return found_columns, reading.how


def _bare(encoding: str) -> str:
    """The encoding without a mark of byte order, to look for a character in the middle of a file."""
    return {"utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(encoding, encoding).removesuffix("-sig")


@contextmanager
def _long_cells() -> Iterator[None]:
    """The csv module takes 131,072 characters a cell by default, for the whole process."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parse(data: bytes, encoding: str, delimiter: str, quoted: bool, columns: Sequence[str] | None) -> _Reading:
    stream = io.TextIOWrapper(io.BytesIO(data), encoding=encoding, newline="")
    quotes = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(stream, delimiter=delimiter, quoting=quotes, strict=True)
    rows, lines, line = [], array("q"), 1
    header = list(columns) if columns is not None else None
    row_names: int | None = None
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            ended = "a quote that is not closed" if "unexpected end" in str(error) else "text after a closing quote"
            raise _MisfitError(
                f"line {line} has {ended}. Double a quote that is inside a quoted cell.", len(rows)
            ) from error
        if not row or (len(row) == 1 and not row[0].strip()):
            continue
        if header is None:
            if row == ["sep=", ""]:
                continue  # Excel's line for itself
            if len(row) < 2:
                raise _MisfitError(
                    f"line {line}, the header, has one column only ({row[0][:80]!r}). Another delimiter? Say delimiter=…",
                    -1,
                )
            header = row
            continue
        if not rows and len(row) == len(header) + 1 and row[0] in ("0", "1") and columns is None:
            row_names, header = int(row[0]), ["", *header]
        if len(row) != len(header) or (row_names is not None and row[0] != str(row_names + len(rows))):
            raise _MisfitError(_misfit(line, row, header, delimiter, row_names is not None, columns), len(rows))
        rows.append(row)
        lines.append(line)
    if header is None:
        raise _MisfitError("it is empty", -1)
    if row_names is not None and len(rows) < _ROW_NAMES_FROM:
        raise _MisfitError(_misfit(lines[0], rows[0], header, delimiter, True, columns), 0)
    return _Reading(delimiter, quoted, header, rows, lines)


def _misfit(
    line: int, row: list[str], header: list[str], delimiter: str, names: bool, columns: Sequence[str] | None
) -> str:
    expected, called = len(header) - names, "columns=" if columns is not None else "the header"
    shown = ", ".join(repr(cell[:40]) for cell in row[:6])
    remedy = f"Put cells that hold a {_NAMES.get(delimiter, repr(delimiter))} in quotes"
    if len(row) > expected and not row[-1].strip():
        remedy = "Does every row end with a delimiter? Remove it, or give the last column a name"
    elif len(row) < expected:
        remedy = "Write empty cells out"
    if columns is not None:
        remedy += ". A file with a header needs no columns="
    return (
        f"line {line} has {len(row)} cells, but {called} {'names' if columns is not None else 'has'} {expected}: {shown}. "
        f"{remedy}; or say delimiter=…"
    )


def _the_reading(found: list[_Reading], name: str, quoting: bool | None) -> _Reading:
    delimiters = list(dict.fromkeys(reading.delimiter for reading in found))
    # Half a quoted cell is no reading next to one that takes quotes for quotes.
    whole = list(dict.fromkeys(reading.delimiter for reading in found if reading.quoted))
    if len(whole or delimiters) > 1:
        could = " and ".join(_NAMES.get(d, repr(d)) for d in whole or delimiters)
        raise DataError(f"{name}: every row fits with {could} as the delimiter. Say which: delimiter=…")
    found = [reading for reading in found if reading.delimiter == (whole or delimiters)[0]]
    quoted = next((reading for reading in found if reading.quoted), None)
    bare = next((reading for reading in found if not reading.quoted), None)
    if quoted is None or quoting is not None:
        return found[0]
    if bare is not None and (quoted.header, quoted.rows) != (bare.header, bare.rows):
        differ = next((i for i, (a, b) in enumerate(zip(quoted.rows, bare.rows, strict=False)) if a != b), 0)
        # In tab-separated text, quotes are as often characters; in the others they are quotes by any standard.
        if quoted.delimiter == "\t" and not _needs_quotes(quoted, bare):
            raise DataError(
                f"{name}: from line {quoted.lines[differ]} on, quotes may wrap cells or be characters of the text; all rows "
                "fit either way. Say quoting=True or quoting=False."
            )
    if (line := _swallowed(quoted)) is not None:
        raise DataError(
            f"{name}: the cell that opens with a quote in line {line} goes on over lines that look like rows of their own. "
            "Say quoting=True if that is one cell, quoting=False if quotes are only characters; or mend the line."
        )
    return quoted


def _has_wrapped_cells(bare: _Reading) -> bool:
    """Whether quotes stand around a name in the header, most cells of a column, or what holds a quote after a backslash."""

    def wrapped(cell: str) -> bool:
        return len(cell) > 1 and cell[0] == cell[-1] == '"'

    if any(wrapped(cell) for cell in bare.header):
        return True
    for place in range(len(bare.header)):
        cells = [row[place] for row in bare.rows if row[place]]
        around = [cell for cell in cells if wrapped(cell)]
        if len(around) > 0.5 * len(cells) or any('\\"' in cell for cell in around):
            return True
    return False


def _needs_quotes(quoted: _Reading, bare: _Reading) -> bool:
    """Whether quotes are there for a reason (a delimiter or quote inside), or around every cell of a column."""
    if len(quoted.rows) != len(bare.rows):
        return False
    for place in range(len(quoted.header)):
        pairs = [(a[place], b[place]) for a, b in zip(quoted.rows, bare.rows, strict=True)]
        wrapped = [a for a, b in pairs if a != b]
        if len(wrapped) < sum(b != "" for _, b in pairs) and not all(
            any(sign in cell for sign in (quoted.delimiter, '"', "\n", "\r")) for cell in wrapped
        ):
            return False
    return True


def _swallowed(reading: _Reading) -> int | None:
    """The line of a cell whose own lines fit the header, with values in a column that other rows have there, too."""
    long = [i for i, row in enumerate(reading.rows) if any("\n" in cell or "\r" in cell for cell in row)]
    if not long:
        return None
    others = set(range(len(reading.rows))).difference(long)
    usual = [{reading.rows[i][place] for i in others} for place in range(len(reading.header))]
    for i in long:
        pieces = [
            piece.split(reading.delimiter) for piece in re.split(r"\r\n|\r|\n", reading.delimiter.join(reading.rows[i]))
        ]
        if all(len(piece) == len(usual) for piece in pieces) and any(
            all(piece[place].strip().strip('"') in values for piece in pieces) for place, values in enumerate(usual)
        ):
            return reading.lines[i]
    return None


def _header(reading: _Reading, name: str, columns: Sequence[str] | None, roles: Sequence[str]) -> list[str]:
    """The stripped names of columns. Raises DataError for what is doubled, or is no header."""
    header = [title.strip() for title in reading.header]
    if columns is not None:
        if reading.rows and [cell.strip() for cell in reading.rows[0]] == header:
            del reading.rows[0], reading.lines[0]
        elif reading.rows and sum(known_name(cell) for cell in reading.rows[0]) > 1:
            raise DataError(
                f"{name}: columns= is for a file without a header, but line {reading.lines[0]} looks like one: "
                f"{', '.join(map(repr, reading.rows[0]))}. Leave columns= out."
            )
    elif (cell := _like_data(header, reading, roles)) is not None:
        raise DataError(
            f"{name} seems to have no header: {cell[:80]!r} in its first line looks like a value, not like the name of a "
            "column. Name the columns: columns=[…]. If it is a header, say which columns are which: text=…, label=…"
        )
    if twice := sorted({title for title in header if title and header.count(title) > 1}):
        raise DataError(f"{name}: the header names {', '.join(map(repr, twice))} twice; give every column its own name")
    titles = [_title(cell) for cell in reading.header]
    again = (
        i
        for i, row in enumerate(reading.rows)
        if _title(row[0]) == titles[0] and [_title(cell) for cell in row] == titles
    )
    if (again := next(again, None)) is not None:
        raise DataError(f"{name}: line {reading.lines[again]} repeats the header; remove it")
    return header


def _title(cell: str) -> str:
    """A cell as the name of a column that another program may have written in another way."""
    return cell.strip("\ufeff \t").lower()


def _like_data(header: list[str], reading: _Reading, roles: Sequence[str]) -> str | None:
    """A cell of the first row that shows it to be no header, if there is one."""
    if roles and set(roles) <= set(header):
        return None
    if (named := header[header[0] == "" :]) == [str(number) for number in range(len(named))]:
        return None  # the numbers that pandas gives to columns without names, behind its index or not
    below = [sum(row[place].strip() == title for row in reading.rows) for place, title in enumerate(header)]
    # Once may be chance; a label `y` among labels y and n is not.
    names = [title for title, times in zip(header, below, strict=True) if known_name(title) and times < 2]
    if len(names) > 1:
        return None
    for title, times in zip(header, below, strict=True):
        if title and title not in names and (NUMBER.fullmatch(title) or DATE.fullmatch(title) or times):
            return title
    prose = [title for title in header if len(title.split()) > 3]
    return prose[0] if prose and not names else None


def _assert_nothing_of_interest(cells: list[str], place: int, reading: _Reading, name: str) -> None:
    """A column without a name may be empty or an index, but nothing that would be missed."""
    filled = [i for i, cell in enumerate(cells) if cell.strip()]
    index = place == 0 and (all(NUMBER.fullmatch(cell) for cell in cells) or len(set(cells)) == len(cells))
    if filled and not index:
        raise DataError(
            f"{name}: line {reading.lines[filled[0]]} has {cells[filled[0]][:40]!r} in column {place + 1}, which has no "
            "name. Does a text hold a delimiter without quotes? Quote it, or name the column."
        )
