"""Arrays and tables as `mlpipes predict` reads them: some rows at a time, texts as texts, damage told."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from mlpipes.errors import DataError
from mlpipes.serving.arrays import ArrayFile
from mlpipes.serving.signature import Column, Signature
from mlpipes.serving.tables import check_kind, chunks

TEXTS = Signature((Column("text", "str", ()),), (), is_tensor=False, answers_tensor=False)
ROWS: list[dict[str, Any]] = [{"id": n, "text": f"007 {n}\n" if n % 3 else ""} for n in range(25)]


@pytest.mark.parametrize("shape", [(23,), (23, 2), (23, 3, 4, 5), (0, 3), (23, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_an_array_are_read_some_at_a_time_in_either_order(order: Any, shape: Any, tmp_path: Path) -> None:
    wanted = np.asarray(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), order=order)
    np.save(tmp_path / "x.npy", wanted)
    found = list(ArrayFile.of(tmp_path / "x.npy").rows(10))
    assert [len(each) for each in found] == [10, 10, 3][: 3 * (shape[0] > 0)]
    assert np.array_equal(np.concatenate([wanted[:0], *found]), wanted)


def test_headers_that_make_no_sense_are_told(tmp_path: Path) -> None:
    (odd := tmp_path / "x.npy").touch()
    for shape, kind in (
        ((-250,), "<f4"),
        ((True,), "<f4"),
        ((10**30,), "<f4"),
        ((4,), "|O"),
        ((4,), "what"),
        ((), "<f4"),
    ):
        header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        odd.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(16))
        with pytest.raises(DataError, match=r"x\.npy (is no array of NumPy|holds)"):
            ArrayFile.of(odd)
    odd.write_bytes(b"\x93NUMPY\x01\x00" + (5000).to_bytes(2, "little") + b"(" * 5000)
    with pytest.raises(DataError, match=r"x\.npy is no array of NumPy"):
        ArrayFile.of(odd)
    with odd.open("wb") as stream:
        np.savez(stream, a=np.zeros(3))
    with pytest.raises(DataError, match=r"x\.npy is no array of NumPy"):
        ArrayFile.of(odd)


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.jsonl"])
def test_tables_come_in_chunks_with_all_of_their_columns(name: str, tmp_path: Path) -> None:
    path, table = tmp_path / name, pa.Table.from_pylist(ROWS)
    if name.endswith("parquet"):
        pq.write_table(table, path, row_group_size=4)
    elif name.endswith("csv"):
        pa_csv.write_csv(table, path)
    else:
        path.write_text("\n".join(map(json.dumps, ROWS)))
    found = list(chunks(path, TEXTS, 10))
    assert [(c.number, c.first) for c in found] == [(0, 0), (1, 10), (2, 20)]
    assert [text for c in found for text in dict(c.values)["text"].tolist()] == [row["text"] for row in ROWS]  # type: ignore[arg-type]
    assert [row for c in found if c.table is not None for row in c.table.to_pylist()] == ROWS


def test_a_text_that_looks_like_a_number_or_like_nothing_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text\n007\nNA\n1e5\n")
    (chunk,) = chunks(tmp_path / "t.csv", TEXTS, 10)
    assert dict(chunk.values)["text"].tolist() == ["007", "NA", "1e5"]  # type: ignore[arg-type]
    for content, says in (("other\n1\n", r"columns\.text: the column is missing"), ("text\n1,2\n", "cannot be read")):
        (tmp_path / "t.csv").write_text(content)
        with pytest.raises(DataError, match=says):
            list(chunks(tmp_path / "t.csv", TEXTS, 10))


@pytest.mark.parametrize(
    ("content", "texts"), [("text\na\n\nb\n", ["a", "", "b"]), ("text,id\na,1\n\nb,2\n\n", ["a", "b"])]
)
def test_an_empty_line_is_a_row_where_it_can_be_one(content: str, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(content)
    (chunk,) = chunks(tmp_path / "t.csv", TEXTS, 10)
    assert dict(chunk.values)["text"].tolist() == texts  # type: ignore[arg-type]


def test_a_quote_that_is_not_closed_is_told_where_it_is(tmp_path: Path) -> None:
    for content, says in (
        ('text\na\n"abc\ndef\n', "after line 2: unexpected end of data"),
        ('text\n"a"b\n', "after line 1: ',' expected after"),
        ("text\n\udce9\n", "t.csv, after line 0: 'utf-8' codec"),
    ):
        (tmp_path / "t.csv").write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(DataError, match=says):
            check_kind(tmp_path / "t.csv", TEXTS)


def test_texts_are_texts_whatever_they_look_like_and_however_long_they_are(tmp_path: Path) -> None:
    texts = ["2020-01-01", "12:30", "x" * 3_000_000, "1"]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in texts))
    (tmp_path / "t.csv").write_text("\n".join(["text,id", *(f"{text},1" for text in texts)]))
    for name in ("t.jsonl", "t.csv"):
        check_kind(tmp_path / name, TEXTS)
        (chunk,) = chunks(tmp_path / name, TEXTS, 10)
        assert dict(chunk.values)["text"].tolist() == texts  # type: ignore[arg-type]
        assert chunk.table is not None
        assert chunk.table["id"].to_pylist() == [1] * 4


def test_a_damaged_table_is_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [f"{n} of many" for n in range(1000)]}), path := tmp_path / "t.parquet")
    data = path.read_bytes()
    path.write_bytes(data[:20] + bytes(200) + data[220:])
    with pytest.raises(DataError, match=r"t\.parquet cannot be read"):
        list(chunks(path, TEXTS, 10))
