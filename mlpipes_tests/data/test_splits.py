"""Splits of texts: rare classes, groups, caps, and a thousand classes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpipes.data.dataset import Dataset, Provenance
from mlpipes.data.ragged import Ragged
from mlpipes.data.splits import SplitPlan, split_dataset
from mlpipes.data.tables import TableSource
from mlpipes.errors import ConfigError, DataError
from mlpipes_tests.texts import PLAN, write_jsonl


def test_rare_classes_and_groups_are_split_as_they_should() -> None:
    labels = np.array([0] * 900 + [1] * 90 + [2] * 10)
    columns = {"text": Ragged.of_texts(f"row {n}" for n in range(1000)), "label": labels, "file": np.arange(1000) // 7}
    dataset = Dataset({"train": columns}, Provenance("x", "", "", ""), {})
    splits, _ = split_dataset(dataset, PLAN)
    for split, share in (("train", 0.6), ("validation", 0.2), ("test", 0.2)):
        counts = np.bincount(splits[split]["label"], minlength=3)
        assert np.abs(counts - share * np.array([900, 90, 10])).max() <= 2
    splits, _ = split_dataset(dataset, SplitPlan(0.1, test_fraction=0.2, content=("text",), group_by="file"))
    files = [set(splits[split]["file"]) for split in ("train", "validation", "test")]
    assert not files[0] & files[1]
    assert not files[0] & files[2]
    assert not files[1] & files[2]
    assert abs(len(splits["test"]["label"]) - 200) <= 7
    splits, _ = split_dataset(
        dataset, SplitPlan(0.1, test_fraction=0.2, stratify_by="label", content=("text",), train_cap=100)
    )
    assert np.bincount(splits["train"]["label"], minlength=3).tolist() == [90, 9, 1]


def test_a_thousand_classes_are_all_in_every_split(tmp_path: Path) -> None:
    rows = [{"text": f"the item called i{n % 1000} in row {n}", "label": f"c{n % 1000}"} for n in range(3000)]
    dataset = TableSource(str(write_jsonl(tmp_path / "many.jsonl", rows))).load()
    assert len(dataset.facts["class_names"]) == 1000
    splits, _ = split_dataset(dataset, PLAN)
    assert len(splits["test"]["label"]) == 600
    assert len(np.unique(splits["train"]["label"])) == 1000


NOWHERE = Provenance("Mine", "", "", "")


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        (
            {"train": {"x": np.zeros(9), "label": np.zeros(10)}},
            "one row a sample, but their rows are 'x' 9, 'label' 10",
        ),
        ({"train": {"x": np.zeros(9)}, "validation": {"x": np.zeros(9)}}, "the splits 'train', 'validation'; it must"),
        ({"test": {"x": np.zeros(9)}}, "the splits 'test'; it must bring 'train'"),
        ({"train": {}}, "Mine, train: there is no column"),
        (
            {"train": {"x": np.array(["a", "b"], dtype=object)}},
            "Mine, train: the column 'x' holds object; it must hold",
        ),
        (
            {"train": {"x": np.zeros(2, dtype="datetime64[s]")}},
            r"'x' holds datetime64\[s\]; .* times into their distance",
        ),
        ({"train": {"x": np.zeros(2, dtype=">f4")}}, "'x' is in the byte order of other machines"),
        ({"train": {"x": [1, 2]}}, "the column 'x' is of type list; make a NumPy array of it"),
    ],
)
def test_columns_that_would_be_misread_are_errors(splits: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Dataset(splits, NOWHERE)


@pytest.mark.parametrize("value", [float("nan"), np.zeros(2), {"a": {1, 2}}])
def test_facts_that_are_no_json_are_errors(value: Any) -> None:
    with pytest.raises(DataError, match=r"Mine: facts cannot be kept as JSON .*fill these first"):
        Dataset({"train": {"x": np.zeros(9)}}, NOWHERE, {"mean": value})


def test_pairs_of_texts_that_are_glued_alike_are_different_samples() -> None:
    pairs = [("ab", "c"), ("a", "bc"), ("", "abc"), *((f"{n}", "x") for n in range(40))]
    columns = {"text": Ragged.of_texts(a for a, _ in pairs), "text_pair": Ragged.of_texts(b for _, b in pairs)}
    dataset = Dataset({"train": columns}, NOWHERE)
    _, duplicates = split_dataset(dataset, SplitPlan(0.1, test_fraction=0.2, content=("text", "text_pair")))
    assert duplicates["train_rows_dropped_because_repeated"] == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"content": "text"}, {"seed": None}, {"seed": -1}, {"seed": 1.5}, {"validation_fraction": "0.1"}, {"train_cap": "9"},
        {"stratify_by": ["label"]}, {"group_by": 5}, {"test_fraction": "10%"},
    ],
)  # fmt: skip
def test_a_plan_says_which_of_its_settings_cannot_be_meant(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=rf"split plan: {name}="):
        SplitPlan(**wrong)


@pytest.mark.parametrize("role", ["stratify_by", "group_by"])
def test_a_column_to_split_by_has_one_value_a_sample(role: str) -> None:
    columns = {"text": Ragged.of_texts(f"row {n}" for n in range(20)), "pixels": np.zeros((20, 2))}
    for name in columns:
        with pytest.raises(DataError, match=rf"Mine: {role}='{name}' is no column of one value a sample"):
            split_dataset(
                Dataset({"train": columns}, NOWHERE), replace(SplitPlan(0.1, test_fraction=0.2), **{role: name})
            )
