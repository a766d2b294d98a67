"""The digest of a split's rows: what two evaluations must have in common for their samples to be compared."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpipes.data.dataset import rows_digest
from mlpipes.data.snapshot import Prepared, Snapshot, snapshot_of
from mlpipes.data.splits import SOURCE_INDEX
from mlpipes.store.layout import Store
from mlpipes_tests.conftest import tiny_dataset
from mlpipes_tests.data.test_snapshot import PLAN, TinyWorkload


class Doubling(TinyWorkload):
    """Prepares the pictures, and says nothing of the raw ones."""

    preparation = {"factor": 2}  # noqa: RUF012 - never written to

    def prepare(self, splits: Any, facts: Any, scratch: Path) -> Prepared:
        return Prepared({name: dict(c) | {"image": c["image"] * 2} for name, c in splits.items()}, facts)


def made(root: Path, workload: TinyWorkload) -> Snapshot:
    return snapshot_of(Store(root), workload.load().digest(), workload)[0]


def test_a_preparation_changes_the_snapshot_and_not_its_rows(tmp_path: Path) -> None:
    plain, doubled = made(tmp_path, TinyWorkload(tiny_dataset())), made(tmp_path, Doubling(tiny_dataset()))
    assert plain.digest != doubled.digest
    assert {split: plain.rows(split) for split in plain.counts} == {
        split: doubled.rows(split) for split in plain.counts
    }
    assert len({plain.rows(split) for split in plain.counts}) == 3


def test_a_smaller_training_split_leaves_the_test_rows_as_they_are(tmp_path: Path) -> None:
    whole, part = (made(tmp_path, TinyWorkload(tiny_dataset(), replace(PLAN, train_cap=cap))) for cap in (None, 30))
    assert whole.digest != part.digest
    assert whole.rows("train") != part.rows("train")
    for split in ("validation", "test"):
        assert whole.rows(split) == part.rows(split)


def changed(name: str, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns with one pixel, one label, the order, a row number or an unrelated column changed."""
    columns = {key: column.copy() for key, column in columns.items()}
    if name == "pixel":
        columns["image"][0, 0, 0, 0] += 1
    elif name == "label":
        columns["label"][0] += 1
    elif name == "order":
        columns = {key: column[::-1] for key, column in columns.items()}
    elif name == "row number":
        columns[SOURCE_INDEX] += 1
    elif name == "another column":
        columns["weight"] = np.ones(len(columns["label"]))
    return columns


@pytest.mark.parametrize(
    ("name", "same"),
    [("pixel", False), ("label", False), ("order", False), ("row number", True), ("another column", True)],
)
def test_content_labels_and_order_count_and_nothing_else(name: str, same: bool) -> None:
    columns: Any = dict(tiny_dataset().splits["train"])
    columns[SOURCE_INDEX] = np.arange(len(columns["label"]))
    assert (rows_digest(changed(name, columns), ("image",)) == rows_digest(columns, ("image",))) is same


def test_a_snapshot_that_keeps_no_content_has_rows_of_its_own(tmp_path: Path) -> None:
    """One that notes no rows, and whose preparation drops what they would be derived from."""
    named = made(tmp_path, TinyWorkload(tiny_dataset(), replace(PLAN, content=("image",))))
    noted = named.meta.pop("rows")
    assert named.rows("test") == noted["test"], "derived from what it holds"
    named.meta["columns"].remove("image")
    assert named.rows("test") == named.digest
    unnamed = made(tmp_path, TinyWorkload(tiny_dataset(), replace(PLAN, content=())))
    del unnamed.meta["rows"]
    assert unnamed.rows("test") == unnamed.digest, "not of its labels alone"
