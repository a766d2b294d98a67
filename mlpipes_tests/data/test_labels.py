"""Labels: classes as they are written, numbers where they are meant, and what is missing, over all files of a table."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlpipes.data.tables import TableSource
from mlpipes.errors import DataError
from mlpipes_tests.texts import write_jsonl


def written(path: Path, labels: list[str], start: int = 0) -> str:
    """A csv of these labels, quoted as they are."""
    lines = [f'text number {n},"{label}"' for n, label in enumerate(labels, start)]
    path.write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    return str(path)


def load(tmp_path: Path, labels: list[str], test: list[str] | None = None, **options: Any) -> Any:
    held = {"test": written(tmp_path / "test.csv", test, 1000)} if test else {}
    return TableSource(written(tmp_path / "x.csv", labels), **held, **options).load()


def labels_of(dataset: Any, split: str = "train") -> list[str]:
    return [dataset.facts["class_names"][n] for n in dataset.splits[split]["label"]]


@pytest.mark.parametrize(
    "labels",
    [
        ["01", "1", "001"], ["1E5", "10E4", "100000"], ["9007199254740992", "9007199254740993"], ["true", "false"],
        ["True", "true", "1"], ["1.10", "1.1"], ["0.0", "1.0"], ["-1", "0", "1"], ["+1", "1"], ["NA", "EU"],
        ["none", "favor", "against"], ["null", "x"], ["nan", "naan"], ["inf", "fin"], ["1_000", "1"], ["１", "1"],
        ["1e9999", "2e9999", "9" * 5000], ["²", "1"], ["--1", "-1"], ["0x10", "16"], ["a", "A"], ["1.0", "1", "beta"],
    ],
)  # fmt: skip
def test_every_written_form_is_a_class_of_its_own(tmp_path: Path, labels: list[str]) -> None:
    options = {"task": "classification"} if labels[0] == "1.10" else {}
    dataset = load(tmp_path, labels * 3, test=labels, **options)
    assert labels_of(dataset) == labels * 3
    assert labels_of(dataset, "test") == labels
    assert sorted(dataset.facts["class_names"]) == sorted(labels)


def test_classes_are_in_a_stable_order(tmp_path: Path) -> None:
    assert load(tmp_path, ["b", "10", "9", "a", "-3", "01", "1"]).facts["class_names"] == [
        "-3", "01", "1", "9", "10", "a", "b",
    ]  # fmt: skip


def test_zeros_after_the_point_make_no_difference_among_numbers(tmp_path: Path) -> None:
    dataset = load(tmp_path, ["1.0", "2.0", "1.0"], test=["1", "2", "2.00"])
    assert labels_of(dataset) == ["1", "2", "1"]
    assert labels_of(dataset, "test") == ["1", "2", "2"]


@pytest.mark.parametrize(
    "word", ["NA", "NaN", "nan", "N/A", "null", "None", "<NA>", "1.#QNAN", "#N/A N/A", "", "  ", "\u00a0"]
)
def test_words_for_missing_are_missing_among_numbers_and_truth_values(tmp_path: Path, word: str) -> None:
    for labels in (["0", "1"], ["0.5", "1.25"], ["true", "false"]):
        dataset = load(tmp_path, [*labels, word])
        assert dataset.counts == {"train": 2}
        assert dataset.facts["dropped"]["train"]["without label"] == 1
    dataset = load(tmp_path, ["0", "1"], test=["0", "1", word])
    assert dataset.counts == {"train": 2, "test": 2}, "decided over both files"
    if word.strip():
        assert load(tmp_path, ["0", "1", word], class_names=["0", "1", word]).counts == {"train": 3}


def test_blanks_around_labels_do_not_count(tmp_path: Path) -> None:
    assert labels_of(load(tmp_path, [" a", "a ", "b", "\tb\u00a0"], test=["a  ", "b"])) == ["a", "a", "b", "b"]


def test_numbers_are_decided_over_the_whole_column_of_all_files(tmp_path: Path) -> None:
    labels = [str(n % 5) for n in range(12_000)]
    assert labels_of(load(tmp_path, [*labels, "unknown"])) == [*labels, "unknown"]
    assert load(tmp_path, [*labels, "2.5"]).splits["train"]["label"].tolist() == [*map(float, labels), 2.5]
    assert load(tmp_path, ["1", "2"], test=["1.5"]).facts["roles"]["task"] == "regression"
    assert load(tmp_path, ["1", "2", "3"], task="regression").splits["train"]["label"].tolist() == [1.0, 2.0, 3.0]
    assert labels_of(load(tmp_path, ["0.5", "1.5"], task="classification")) == ["0.5", "1.5"]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["1.5", "inf"], {}, "'label' has 'inf': an infinite number"),
        (["0", "1", "-Infinity"], {}, "'label' has '-Infinity'"),
        (["1.5", "inf"], {"task": "regression"}, "infinite"),
        (["1.5", "1e400"], {}, "'1e400' in column 'label', row 2, is no finite number"),
        (["1.5", "abc"], {"task": "regression"}, "'abc' in column 'label', row 2, is no finite number"),
        (["0.5e200", "1.5"], {"task": "regression"}, "too large to square"),
        (["2024-01-01", "2024-01-02"], {}, "'label' holds values of type date"),
        (["12:30", "07:15"], {}, "'label' holds values of type time"),
        (["[0]", "[0, 1]"], {}, "'label' holds values of type list"),
        (["{'a': 1}", "{'b': 2}"], {}, "'label' holds values of type object"),
        ([f"{n},5" for n in range(30)], {}, "decimal comma: write a point"),
        ([f"word {n}" for n in range(30)], {}, "30 distinct values in 30 rows: it looks like no class"),
        (["a", "b", "c"], {"class_names": ["a", "b"]}, r"none of the classes 'a', 'b': 'c' \(1 rows\)"),
        (["0", "1", "2"], {"class_names": ["a", "b"]}, "none of the classes"),
        (["a", "a"], {}, r"has 1 class \(a\)"),
        (["NA", ""], {}, r"has 1 class \(NA\)"),
        (["", ""], {}, "has 0 class"),
    ],
)
def test_what_is_neither_class_nor_number_is_refused(
    tmp_path: Path, labels: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, labels, **options)
    assert "x.csv" in str(caught.value)


def test_class_names_are_named_or_numbered_by_labels(tmp_path: Path) -> None:
    names = ["neg", "pos", "never seen"]
    assert labels_of(load(tmp_path, ["0", "1", "0"], test=["1", "0"], class_names=names)) == ["neg", "pos", "neg"]
    dataset = load(tmp_path, ["pos", "neg"], class_names=names)
    assert dataset.facts["class_names"] == names
    assert dataset.splits["train"]["label"].tolist() == [1, 0]
    assert labels_of(load(tmp_path, ["0", "1"], class_names=["1", "0"])) == ["0", "1"], "names come before numbers"
    assert labels_of(load(tmp_path, ["0.0", "1.0"], test=["1", "0"], class_names=names), "test") == ["pos", "neg"]


def parquet(path: Path, columns: dict[str, Any], names: list[str] | None = None) -> str:
    import pyarrow as pa
    from pyarrow import parquet as pq

    table = pa.table(columns)
    if names is not None:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, path)
    return str(path)


def test_parquet_classes_have_their_names_and_minus_one_is_missing(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", {"text": ["a b", "c d", "e f"], "label": [1, 0, -1]}, ["neg", "pos"])
    dataset = TableSource(path).load()
    assert dataset.facts["class_names"] == ["neg", "pos"]
    assert labels_of(dataset) == ["pos", "neg"]
    test = written(tmp_path / "test.csv", ["neg", "pos"])
    assert labels_of(TableSource(path, test=test).load(), "test") == ["neg", "pos"]
    path = parquet(tmp_path / "y.parquet", {"text": ["a b", "c d"], "label": [0, 2]}, ["neg", "pos"])
    with pytest.raises(DataError, match="column 'label' has '2', but its 2 classes are numbered from 0"):
        TableSource(path).load()


def test_what_numbers_stand_for_is_said_by_the_columns_type_even_if_names_are_digits(tmp_path: Path) -> None:
    texts = {"text": ["a b", "c d", "e f"]}
    path = parquet(tmp_path / "x.parquet", texts | {"label": [0, 1, 2]}, ["1", " 2", "3"])
    assert labels_of(TableSource(path).load()) == ["1", "2", "3"]
    path = parquet(tmp_path / "y.parquet", texts | {"label": ["2", "1", "3 "]}, ["1", "2", "3"])
    assert labels_of(TableSource(path).load()) == ["2", "1", "3"]
    for names in (["a", "a"], ["a", ""], [1, 2]):
        path = parquet(tmp_path / "z.parquet", texts | {"label": [0, 1, 0]}, names)  # pyright: ignore[reportArgumentType]
        with pytest.raises(DataError, match=r"classes of column 'label' are to be texts, each once"):
            TableSource(path).load()


def test_typed_columns_are_as_if_written(tmp_path: Path) -> None:
    import datetime
    from decimal import Decimal

    texts = {"text": ["a b", "c d", "e f"]}
    for values, classes in (
        ([True, False, None], ["False", "True"]),
        ([2**63 - 1, 2**63 - 2, None], [str(2**63 - 2), str(2**63 - 1)]),
        ([1.0, 0.0, float("nan")], ["0", "1"]),
        ([Decimal("1.0"), Decimal("2.0"), None], ["1.0", "2.0"]),
        (["x", "y", None], ["x", "y"]),
        ([b"x", b"y", None], ["x", "y"]),
    ):
        dataset = TableSource(parquet(tmp_path / "x.parquet", {**texts, "label": values})).load()
        assert dataset.facts["class_names"] == classes
        assert dataset.counts == {"train": 2}
    for value, kind in (
        (datetime.date(2024, 1, 1), "date32"),
        (datetime.datetime(2024, 1, 1), "timestamp"),
        (datetime.time(12, 30), "time64"),
        (datetime.timedelta(1), "duration"),
        ([1], "list"),
        ({"a": 1}, "struct"),
        (b"\xff", "binary"),
    ):
        with pytest.raises(DataError, match=rf"'label' holds values of type {kind}"):
            TableSource(parquet(tmp_path / "x.parquet", {**texts, "label": [value] * 3})).load()
    numbered = TableSource(parquet(tmp_path / "x.parquet", {"text": [1, 2, None], "label": ["x", "y", "x"]})).load()
    assert list(numbered.splits["train"]["text"].texts()) == ["1", "2"]


def test_json_numbers_are_as_written_and_other_values_are_refused(tmp_path: Path) -> None:
    def load_json(*labels: str, name: str = "x.jsonl") -> Any:
        lines = [f'{{"text": "some text {n}", "label": {label}}}' for n, label in enumerate(labels)]
        (tmp_path / name).write_text("\n".join(lines))
        return TableSource(str(tmp_path / name)).load()

    assert load_json("1E5", "10E4", "1E5").facts["class_names"] == ["10E4", "1E5"]
    assert load_json("9007199254740993", "9007199254740992", "9" * 5000).counts == {"train": 3}
    assert load_json("true", "false", "null").facts["class_names"] == ["false", "true"]
    assert load_json("0.5", "NaN", "1").splits["train"]["label"].tolist() == [0.5, 1.0]
    for value, kind in (("[1]", "list"), ("{}", "object")):
        with pytest.raises(DataError, match=f"'label' holds values of type {kind}"):
            load_json("1", value)
    with pytest.raises(DataError, match="infinite"):
        load_json("0.5", "Infinity")
    for line, message in (
        ('{"text": "x y", "label": 1, "label": 2}', "line 1 is not JSON: it has the key 'label' twice"),
        ('{"text": "x', "line 1 is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("5\n6", "row 1 is no JSON object"),
        ("[]", "has no rows"),
        (" \n ", "is empty"),
        ('{"train": [{"a": 1}], "test": [{"a": 1}]}', "several tables"),
        ('{"text": "half \\ud83d", "label": "a"}\n{"text": "x y", "label": "b"}', "row 1, has half a character"),
    ):
        (tmp_path / "y.jsonl").write_text(line)
        with pytest.raises(DataError, match=message):
            TableSource(str(tmp_path / "y.jsonl")).load()


def test_json_may_be_rows_columns_or_one_table_inside(tmp_path: Path) -> None:
    rows = [{"text": "one text", "label": "a"}, {"text": "two\u2028text", "label": "b", "late": "key"}]
    columns = {"text": [row["text"] for row in rows], "label": ["a", "b"]}
    by_row = {name: {str(n): cell for n, cell in enumerate(cells)} for name, cells in columns.items()}
    for content in (rows, {"version": "1", "data": rows}, columns, by_row):
        for indent in (None, 1):
            (tmp_path / "x.json").write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8")
            assert list(TableSource(str(tmp_path / "x.json")).load().splits["train"]["text"].texts()) == columns["text"]
    assert TableSource(str(write_jsonl(tmp_path / "x.json", rows))).load().counts == {"train": 2}
