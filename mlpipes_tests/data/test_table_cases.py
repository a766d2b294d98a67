"""Tables as other people have them, from the layouts of public bug reports: each loads as it stands, or is refused."""

from pathlib import Path
from typing import Any

import pytest

from mlpipes.data.tables import TableSource
from mlpipes.errors import DataError

BITS, SIGNS, FIVE = ["0", "1"], ["neg", "pos"], ["0", "1", "2", "3", "4"]
LOADS: dict[str, tuple[list[str] | None, int, str]] = {
    # class names (None: numbers), rows that are kept, and the columns of text and label if they are not the usual ones
    "Category.csv": (["ham", "spam"], 60, "Message Category"),
    "a [b] {c} *?.csv": (BITS, 60, ""),
    "array.json": (BITS, 60, ""),
    "binary_text.parquet": (BITS, 60, ""),
    "blank_line.jsonl": (BITS, 60, ""),
    "bom.csv": (BITS, 60, ""),
    "bom.jsonl": (BITS, 60, ""),
    "bom.tsv": (BITS, 60, ""),
    "bom_label_first.csv": (BITS, 60, ""),
    "bool.csv": (["False", "True"], 60, ""),
    "bool_lower.csv": (["false", "true"], 60, ""),
    "bool_lower_test.csv": (["false", "maybe", "true"], 21, ""),
    "chunk_float_int.csv": (FIVE, 10_999, ""),
    "chunk_int_str.csv": ([*FIVE, "unknown"], 11_000, ""),
    "chunk_pair_late.csv": (FIVE, 11_000, ""),
    "classlabel.parquet": (SIGNS, 60, ""),
    "columns.json": (BITS, 60, ""),
    "crlf.csv": (BITS, 60, ""),
    "date_text.csv": (BITS, 60, ""),
    "decimal_class.parquet": (["0.00", "1.00"], 60, ""),
    "decimal_label.parquet": (None, 60, "text score"),
    "dict_both.parquet": (SIGNS, 60, ""),
    "dict_label.parquet": (SIGNS, 60, ""),
    "disaster.csv": (BITS, 60, "text target"),
    "empty_label.csv": (BITS, 54, ""),
    "empty_lines.csv": (BITS, 60, ""),
    "float16_label.parquet": (None, 60, "text score"),
    "floats.csv": (["0.0", "1.0"], 60, ""),
    "header_space.csv": (SIGNS, 60, "Text Label"),
    "huge_ints.csv": (["9007199254740992", "9007199254740993"], 60, ""),
    "huge_ints_bigger.csv": (["28446744073709551614", "28446744073709551615"], 60, ""),
    "huge_ints_gap.csv": (["9007199254740992", "9007199254740993", "9007199254740995"], 59, ""),
    "huge_ints_uint.csv": (["18446744073709551614", "18446744073709551615"], 60, ""),
    "index_column.csv": (BITS, 60, ""),
    "index_column_odd.csv": (BITS, 60, "review polarity"),
    "int_typo.csv": (BITS, 60, ""),
    "label_spaces.csv": (SIGNS, 60, ""),
    "large_string.parquet": (SIGNS, 60, ""),
    "leading_zero.csv": (["0111", "0112"], 60, ""),
    "leading_zero_merge.csv": (["01", "1", "10"], 60, ""),
    "long.csv": (BITS, 40, ""),
    "minus_one.csv": (["-1", "0", "1"], 60, ""),
    "missing_key.jsonl": (BITS, 60, ""),
    "mixed.jsonl": (BITS, 60, ""),
    "mixed_labels.csv": (["1", "neg"], 60, ""),
    "mixed_late.jsonl": (["0", "1", "neg", "pos"], 60, ""),
    "na_r.csv": (BITS, 54, ""),
    "nan.jsonl": (None, 59, "text score"),
    "nan_words.csv": (BITS, 54, ""),
    "nli.csv": (["contradiction", "entailment", "neutral"], 120, "premise label hypothesis"),
    "nul.csv": (BITS, 60, ""),
    "nulls.jsonl": (BITS, 58, ""),
    "numeric_text.csv": (BITS, 60, ""),
    "pandas_categorical.parquet": (SIGNS, 60, ""),
    "plain.csv": (BITS, 60, ""),
    "plain.csv.gz": (BITS, 60, ""),
    "plain.jsonl": (BITS, 60, ""),
    "quoted_newline.csv": (BITS, 60, ""),
    "quoted_tab.tsv": (BITS, 60, ""),
    "reg.csv": (None, 60, "text score"),
    "rownames_r.csv": (SIGNS, 60, ""),
    "same_text.csv": (BITS, 40, ""),
    "semicolon.csv": (BITS, 60, ""),
    "sentiment.csv": (["negative", "positive"], 60, "review sentiment"),
    "three.csv": (["a", "b", "c"], 3, ""),
    "tz_extra.parquet": (BITS, 60, ""),
    "uint8_label.parquet": (BITS, 60, ""),
    "utf16.csv": (BITS, 60, ""),
    "we ird%20ü#x.csv": (BITS, 60, ""),
    "wrapped.json": (BITS, 60, ""),
}
REFUSED = {
    "blank_texts.csv": "no row of 60 has both text and label",
    "blank_texts_given.csv": "no row of 60 has both text and label",
    "comma_decimal.csv": "decimal comma: write a point",
    "cp1252_late.csv": r"line 62 has the bytes b'\\x92.*encoding='cp1252'",
    "date_label.parquet": r"'label' holds values of type date32\[day\]",
    "dup_cols.parquet": "'label' are there twice",
    "dup_columns.csv": "names 'text' twice",
    "dup_labels.csv": "names 'label' twice",
    "empty.csv": "is empty",
    "empty.jsonl": "is empty",
    "empty.tsv": "is empty",
    "extra_header_pair.csv": "line 2 has 3 cells, but the header has 2",
    "header_only.csv": "no rows",
    "header_only.tsv": "no rows",
    "inf_reg.csv": "'score' has 'inf'",
    "latin1.csv": r"line 2 has the bytes b'\\xe9.*encoding='cp1252'",
    "list_label.jsonl": "'label' holds values of type list",
    "list_label.parquet": "'label' holds values of type list<",
    "list_text.jsonl": "text column 'text' holds values of type list",
    "nested.jsonl": "'data' holds values of type object",
    "nested_label.jsonl": "'label' holds values of type object",
    "short_rows.csv": "line 2 has 2 cells, but the header has 3",
    "trailing_comma.csv": "line 2 has 3 cells, but the header has 2.*end with a delimiter",
    "truncated.jsonl": "line 61 is not JSON",
    "unquoted_comma_all.csv": "line 2 has 3 cells",
    "unquoted_comma_first.csv": "line 2 has 3 cells",
    "unquoted_comma_late.csv": "line 11 has 3 cells",
}


@pytest.fixture(name="cases")
def tables_of(cases: Path) -> Path:
    return cases / "tables"


def load(path: Path, **options: Any) -> Any:
    return TableSource(str(path), **options).load()


@pytest.mark.parametrize("name", LOADS)
def test_a_case_loads_as_it_stands(cases: Path, name: str) -> None:
    classes, rows, columns = LOADS[name]
    dataset = load(cases / name)
    text, label, pair = [*(columns or "text label").split(), None][:3]
    task = "regression" if classes is None else "classification"
    assert dataset.facts["roles"] == {"text": text, "text_pair": pair, "label": label, "task": task}
    assert dataset.facts.get("class_names") == classes
    assert dataset.counts == {"train": rows}
    assert len(set(dataset.splits["train"]["text"].texts())) in (rows, 40 if pair else 1)
    if classes is not None:
        assert set(dataset.splits["train"]["label"].tolist()) == set(range(len(classes)))


@pytest.mark.parametrize("name", REFUSED)
def test_a_case_is_refused_with_what_to_do(cases: Path, name: str) -> None:
    with pytest.raises(DataError, match=REFUSED[name]) as caught:
        load(cases / name)
    assert str(cases / name) in str(caught.value)


def test_cases_whose_error_names_a_setting_load_with_it(cases: Path) -> None:
    assert next(load(cases / "latin1.csv", encoding="latin-1").splits["train"]["text"].texts()).startswith("café ")
    assert list(load(cases / "cp1252_late.csv", encoding="cp1252").splits["train"]["text"].texts())[-1].startswith(
        "it’s fine"
    )


def test_numbers_as_large_as_floats_are_classes_or_refused(cases: Path) -> None:
    assert load(cases / "huge_reg.csv").facts["class_names"][-1] == "6e+300"
    with pytest.raises(DataError, match="too large to square"):
        load(cases / "huge_reg.csv", task="regression")


def test_truth_values_are_the_same_in_both_files(cases: Path) -> None:
    dataset = load(cases / "bool_lower.csv", test=str(cases / "bool_lower_test.csv"))
    assert dataset.counts == {"train": 60, "test": 20}
    assert dataset.facts["dropped"]["test"] == {
        "without label": 0, "without text": 0, "label unseen in training": 1,
    }  # fmt: skip
    test = dataset.splits["test"]
    assert [dataset.facts["class_names"][n] for n in test["label"][:2]] == ["false", "true"]
