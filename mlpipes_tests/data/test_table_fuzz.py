"""Random table files against a slow, obviously right reader: what loads is what stands there, and one reading must load.

`FUZZ_FILES` is how many files are tried; `make test-all` tries 4,000.
"""

import gzip
import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlpipes.data.tables import TableSource
from mlpipes.errors import DataError

FILES = int(os.environ.get("FUZZ_FILES", "300"))
Rows = list[list[str]]

# -- the slow reader ------------------------------------------------------------------------------------------------------


def read(text: str, delimiter: str, quoted: bool) -> Rows | None:
    """The cells of a delimited text, character by character; None if they make no table of two columns or more."""
    rows: Rows = [[""]]
    quotes, at = "none", 0  # none yet in this cell, open, or closed
    while at < len(text):
        sign, at = text[at], at + 1
        if quotes == "open":
            if sign != '"':
                rows[-1][-1] += sign
            elif text[at : at + 1] == '"':
                rows[-1][-1] += '"'
                at += 1
            else:
                quotes = "closed"
        elif sign == delimiter:
            rows[-1].append("")
            quotes = "none"
        elif sign in "\r\n":
            at += sign == "\r" and text[at : at + 1] == "\n"
            rows.append([""])
            quotes = "none"
        elif quotes == "closed":
            return None
        elif sign == '"' and quoted and not rows[-1][-1]:
            quotes = "open"
        else:
            rows[-1][-1] += sign
    rows = [row for row in rows if len(row) > 1 or row[0].strip()]
    widths = {len(row) for row in rows}
    return None if quotes == "open" or len(widths) != 1 or widths == {1} else rows


def is_number(label: str) -> bool:
    return bool(label) and set(label) <= set("0123456789.e+-") and not label.startswith("e") and label != "-"


def short(label: str) -> str:
    """`1` for `1.0`."""
    whole, point, rest = label.partition(".")
    return whole if point and not rest.strip("0") and whole == str(int(whole)) else label


def meaning(rows: Rows) -> Sequence[tuple[str, str | float]] | None:
    """Texts and labels of the rows that have both; None if there is nothing to learn."""
    header = [name.strip() for name in rows[0]]
    pairs = [(row[header.index("text")], row[header.index("label")].strip()) for row in rows[1:]]
    labels = {label for _, label in pairs if label}
    missing = {label for label in labels if label.lower() in ("na", "nan", "null", "none")}
    rest = labels - missing
    numeric = bool(rest) and all(is_number(label) or label == "inf" for label in rest) and rest != {"inf"}
    if numeric or (rest and rest <= {"true", "false", "True"}):
        pairs = [(text, "" if label in missing else label) for text, label in pairs]
    else:
        rest = labels
    if numeric and "inf" in rest:
        return None
    pairs = [(text, label) for text, label in pairs if label]
    known = [(text, label) for text, label in pairs if text.strip()]
    if numeric and any(float(label) % 1 for label in rest):
        return [(text, float(label)) for text, label in known] or None
    forms = {name: [label for label in rest if short(label) == name] for name in map(short, rest)} if numeric else {}
    named = [(text, short(label) if numeric and len(forms[short(label)]) > 1 else label) for text, label in pairs]
    found = [(text, label) for text, label in named if text.strip()]
    return found if found and len({label for _, label in named}) > 1 else None


# -- files ----------------------------------------------------------------------------------------------------------------
SIGNS = st.sampled_from([*"aab  c0,;\t|\"'\\\n", "é", "日", "\r", ' "', '",'])
TEXTS = st.one_of(
    st.lists(SIGNS, max_size=8).map("".join), st.sampled_from(["a film, really", "1000", "NA", "", "  ", '"so"'])
)
LABELS = st.sampled_from(
    [
        ["0", "1"], ["0", "1", ""], ["01", "1", "10"], ["1.0", "1", "2"], ["1.0", "2.0"], ["1e5", "10e4", "3"],
        ["0.25", "1.5", "-2"], ["0", "1", "NA"], ["0", "1", "nan", "inf"], ["neg", "pos"], ["neg", " pos ", "NA"],
        ["true", "false", "null"], ["True", "true", "1"], ["9007199254740993", "9007199254740992"], ["none", "a, b", "c"],
        ['"x"', "y", "x"], ["a\tb", "é"], ["1", "x", "1.0"], ["inf", "fin"], ["0", "-1", "+1"],
    ]
)  # fmt: skip


@dataclass
class File:
    name: str
    rows: Rows
    text: str
    encoding: str
    packed: bool
    options: dict[str, Any]


def quoted_cell(cell: str, delimiter: str, style: str) -> str:
    if style == "all" or (style == "needed" and any(sign in cell for sign in (delimiter, '"', "\n", "\r"))):
        return '"' + cell.replace('"', '""') + '"'
    return cell


@st.composite
def files(draw: st.DrawFn) -> File:
    delimiter = draw(st.sampled_from(",,,;\t\t|"))
    style = draw(st.sampled_from(["needed", "needed", "needed", "all", "none"]))
    labels = draw(LABELS)
    header = draw(
        st.sampled_from([["text", "label"], ["label", "text"], ["text", "label", "extra"], [" text", "label "]])
    )
    rows = [list(header)]
    for text, label, extra in draw(st.lists(st.tuples(TEXTS, st.sampled_from(labels), SIGNS), min_size=3, max_size=8)):
        rows.append([{"text": text, "label": label, "extra": extra}[name.strip()] for name in header])
    if draw(st.integers(0, 14)) == 0:  # a row that does not fit
        row = rows[draw(st.integers(0, len(rows) - 1))]
        if draw(st.booleans()):
            row.append(draw(SIGNS))
        else:
            row.pop()
    end = draw(st.sampled_from(["\n", "\n", "\r\n"]))
    text = end.join(delimiter.join(quoted_cell(cell, delimiter, style) for cell in row) for row in rows)
    text += draw(st.sampled_from(["", end, end * 2]))
    options: dict[str, Any] = {}
    if draw(st.integers(0, 3)) == 0:
        options["delimiter"] = delimiter
    if draw(st.integers(0, 3)) == 0:
        options["quoting"] = style != "none"
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"]))
    if encoding in ("latin-1", "cp1252"):
        text = text.replace("日", "ü")
        rows = [[cell.replace("日", "ü") for cell in row] for row in rows]
        if draw(st.integers(0, 4)):
            options["encoding"] = encoding
    suffix = draw(st.sampled_from(["csv", "csv", "tsv", "txt"]))
    packed = draw(st.integers(0, 5)) == 0
    return File(f"x.{suffix}{'.gz' if packed else ''}", rows, text, encoding, packed, options)


def loaded(path: Path, **options: Any) -> list[tuple[str, str | float]]:
    dataset = TableSource(str(path), **options).load()
    train, names = dataset.splits["train"], dataset.facts.get("class_names")
    labels = [names[n] if names else float(n) for n in train["label"]]
    return list(zip(train["text"].texts(), labels, strict=True))


def check(file: File, folder: Path) -> str:
    """Compare one file with the slow reader; returns what came of it."""
    path, data = folder / file.name, file.text.encode(file.encoding)
    path.write_bytes(gzip.compress(data, 1) if file.packed else data)
    plain = not file.encoding.startswith(("latin", "cp")) or "encoding" in file.options or file.text.isascii()
    readings = [
        (delimiter, quoted, rows)
        for delimiter in ([file.options["delimiter"]] if "delimiter" in file.options else ",;\t|")
        for quoted in ([file.options["quoting"]] if "quoting" in file.options else (True, False))
        if plain and (rows := read(file.text, delimiter, quoted)) is not None
    ]
    tables = [rows for i, (_, _, rows) in enumerate(readings) if rows not in [other for *_, other in readings[:i]]]
    tables = [rows for rows in tables if {"text", "label"} <= {name.strip() for name in rows[0]}]
    try:
        found = loaded(path, **file.options)
    except DataError as error:
        meanings = [meaning(rows) for rows in tables]
        if len(tables) != 1 or None in meanings:
            return {0: "no reading", 1: "nothing to learn"}.get(len(tables), "several readings")
        # The one strict reading may still be asked to be confirmed, where a mistake would look the same.
        assert "quoting=" in str(error), f"{file}\nhas a single reading, {tables[0]}, but: {error}"
        assert loaded(path, **file.options | {"quoting": readings[0][1]}) == meanings[0]
        return "to be confirmed"
    assert found in [meaning(rows) for rows in tables], f"{file}\nis read as {found}"
    if len(tables) > 1 and file.rows in tables and any("\t" in d for d, *_ in readings):
        assert found == meaning(file.rows), f"{file}\nis meant otherwise than {found}"
    return "loaded"


def test_no_file_is_read_otherwise_than_it_stands(tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=FILES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(files())
    def fuzz(file: File) -> None:
        outcomes[check(file, tmp_path)] += 1

    fuzz()
    assert outcomes["loaded"] > 0.4 * outcomes.total(), outcomes
    assert outcomes["no reading"] > 0.05 * outcomes.total(), outcomes
    assert outcomes["to be confirmed"] < 0.02 * outcomes.total(), outcomes


SPLICES = [
    b'"',
    b",",
    b"\n",
    b"\r",
    b"\t",
    b"[",
    b"{",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"nan",
    b"1e999999",
    b"\\ud800",
]


def test_broken_files_are_refused_or_read_but_never_end_in_a_traceback(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = {"text": [f"some text {n}, “quoted”" for n in range(12)], "label": [n % 2 for n in range(12)]}
    parquet.write_table(
        pa.table({**table, "kind": pa.array(["a", "b", "c"] * 4).dictionary_encode()}), tmp_path / "x.parquet"
    )
    rows = list(zip(*table.values(), strict=True))
    lines = "\n".join(["text,label", *(f'"{text}",{label}' for text, label in rows)]).encode()
    whole = {
        "x.csv": lines,
        "x.csv.gz": gzip.compress(lines),
        "x.tsv": lines.replace(b",", b"\t").decode().encode("utf-16"),
        "x.json": json.dumps([{"text": text, "label": label} for text, label in rows]).encode(),
        "x.jsonl": "\n".join(json.dumps({"text": text, "label": label}) for text, label in rows).encode(),
        "x.parquet": (tmp_path / "x.parquet").read_bytes(),
    }
    draw = random.Random(0)  # noqa: S311 - no secret
    outcomes: Counter[str] = Counter()
    for _ in range(FILES):
        name, found = draw.choice(list(whole.items()))
        broken = bytearray(found)
        for _ in range(draw.choice([1, 1, 2, 5])):
            place = draw.randrange(len(broken) + 1)
            broken[place : place + draw.choice([0, 0, 1, 20])] = draw.choice(SPLICES)
        if draw.random() < 0.2:
            broken = broken[: draw.randrange(len(broken))]
        (tmp_path / name).write_bytes(broken)
        options: Any = draw.choice([{}, {}, {"quoting": False}, {"task": "regression"}, {"class_names": ["a", "b"]}])
        try:
            TableSource(str(tmp_path / name), **options).load()
            outcomes["loaded"] += 1
        except DataError as error:
            assert str(tmp_path / name) in str(error)
            outcomes["refused"] += 1
    assert min(outcomes["loaded"], outcomes["refused"]) > 0.05 * FILES, outcomes


@pytest.mark.parametrize(
    ("text", "delimiter", "quoted", "rows"),
    [
        ('a,b\n"x,""y""\n",z\n', ",", True, [["a", "b"], ['x,"y"\n', "z"]]),
        ('a,b\n"x",z\n', ",", False, [["a", "b"], ['"x"', "z"]]),
        ('a,b\n"x"y,z\n', ",", True, None),
        ('a,b\nx"y,"z', ",", True, None),
        ("a,b\nx\n", ",", True, None),
        ("a,b\r\n\r\n ,\r", ",", True, [["a", "b"], [" ", ""]]),
    ],
)
def test_the_slow_reader_is_right(text: str, delimiter: str, quoted: bool, rows: Rows | None) -> None:
    assert read(text, delimiter, quoted) == rows
