"""Splitting: disjoint by content, stratified or by groups, seeded; what was dropped, and why, is reported."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, get_type_hints

import numpy as np
from pydantic import TypeAdapter, ValidationError

from mlpipes.data.dataset import Columns, Dataset
from mlpipes.data.ragged import Ragged
from mlpipes.errors import ConfigError, DataError

SOURCE_INDEX = "source_index"
"""Column added to each split: the row's number in the source split that it came from."""

TEXT_COLUMNS = ("text", "text_pair")
"""The columns that sources of texts bring."""

_SHOWN = 20


@dataclass(frozen=True)
class SplitPlan:
    """How a data set is divided. Everything in here is part of the snapshot's digest."""

    validation_fraction: float = 0.1
    test_fraction: float | None = None
    """Share of the whole for a test split where the source brings none; must be None where it does."""
    seed: int = 0
    stratify_by: str | None = None
    """A column of which each split gets the same share of every value, such as the label of classes."""
    content: tuple[str, ...] = ()
    """The columns whose bytes make two samples the same sample. None named: all texts, or all but `label` without texts."""
    group_by: str | None = None
    """A column of integers; samples that share its value go to the same split. Takes the place of stratification."""
    train_cap: int | None = None
    """At most so many training samples, drawn at random, stratified."""

    def __post_init__(self) -> None:
        """Raises ConfigError for what is of another type, such as `content="text"`, or is no seed."""
        for name, kind in get_type_hints(SplitPlan).items():
            value = getattr(self, name)
            try:
                TypeAdapter(kind).validate_python(tuple(value) if isinstance(value, list) else value, strict=True)
            except ValidationError as error:
                raise ConfigError(f"split plan: {name}={value!r}: {error.errors()[0]['msg']}") from error
        if self.seed < 0:
            raise ConfigError(f"split plan: seed={self.seed}: it must not be negative")

    def as_dict(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self) | {"content": list(self.content)}


def content_columns(named: tuple[str, ...], columns: Iterable[str]) -> tuple[str, ...]:
    """The columns that tell samples apart: those that a plan names, else the texts, else all but label and source index."""
    columns = sorted(columns)
    # Whatever else a source knows of a text, such as its author: the same words are the same sample.
    texts = tuple(name for name in columns if name in TEXT_COLUMNS)
    return named or texts or tuple(name for name in columns if name not in ("label", SOURCE_INDEX))


def content_hashes(columns: Columns, names: tuple[str, ...]) -> list[bytes]:
    """One SHA-256 per row over the bytes of the named columns, each with its length: `ab`, `c` are not `a`, `bc`."""
    arrays = [columns[name] for name in names]
    hashes = []
    for row in range(len(arrays[0])):
        sha = hashlib.sha256()
        for array in arrays:
            content = array[row].tobytes()
            sha.update(len(content).to_bytes(8, "big") + content)  # else the texts "ab", "c" would be "a", "bc"
        hashes.append(sha.digest())
    return hashes


def split_dataset(dataset: Dataset, plan: SplitPlan) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Disjoint `train`, `validation` and `test` columns, and a report of the duplicates found.

    The source's test split is left as it is. A training sample whose content is also in the test split is dropped, and
    of several equal training samples the first is kept, so no content is in two splits. Raises DataError if the plan
    does not fit the data.
    """
    train = dict(dataset.splits["train"])
    content = content_columns(plan.content, train)
    if absent := [n for n in (*content, plan.stratify_by, plan.group_by) if n is not None and n not in train]:
        raise DataError(
            f"{dataset.provenance.name}: the split plan names {', '.join(absent)}, but the columns are {', '.join(train)}"
        )
    for role in ("stratify_by", "group_by"):
        name = getattr(plan, role)
        if name is not None and (isinstance(train[name], Ragged) or np.ndim(train[name]) != 1):
            raise DataError(f"{dataset.provenance.name}: {role}={name!r} is no column of one value a sample")
    train[SOURCE_INDEX] = np.arange(len(next(iter(train.values()))), dtype=np.int64)
    test = dict(dataset.splits["test"]) if "test" in dataset.splits else None
    if (test is None) == (plan.test_fraction is None):
        raise DataError(
            f"{dataset.provenance.name}: the source brings {'no' if test is None else 'a'} test split, "
            f"but the split plan's test_fraction is {plan.test_fraction}"
        )
    train_hashes = content_hashes(train, content)
    test_hashes: list[bytes] = []
    if test is not None:
        if not len(next(iter(test.values()))):
            raise DataError(f"{dataset.provenance.name}: the test split has no samples")
        test[SOURCE_INDEX] = np.arange(len(next(iter(test.values()))), dtype=np.int64)
        test_hashes = content_hashes(test, content)
    keep, report = _without_duplicates(train_hashes, test_hashes, train.get("label"))
    if not len(keep):
        raise DataError(
            f"{dataset.provenance.name}: none of {len(train_hashes):,} training samples is left, as "
            f"{report['train_rows_dropped_because_also_in_test']:,} are also in the test split. Are both the same data?"
        )
    # Rows are only numbers until all is decided, so that large columns are copied once.
    keys = _rows({name: train[name] for name in (SOURCE_INDEX, plan.stratify_by, plan.group_by) if name in train}, keep)
    parts: dict[str, dict[str, Any]] = {}
    if test is None:
        assert plan.test_fraction is not None  # noqa: S101 - narrowed above
        keys, parts["test"] = _divided(keys, plan.test_fraction, plan, "test")
    total = len(keep)
    share = plan.validation_fraction * total / len(keys[SOURCE_INDEX])
    parts["train"], parts["validation"] = _divided(keys, share, plan, "validation")
    rows = len(parts["train"][SOURCE_INDEX])
    if plan.train_cap is not None and plan.train_cap < rows:
        _, parts["train"] = _divided(parts["train"], plan.train_cap / rows, replace(plan, group_by=None), "training")
    splits = {"test": test} if test is not None else {}
    splits |= {name: _rows(train, part[SOURCE_INDEX]) for name, part in parts.items()}
    _assert_disjoint(splits, content)
    return splits, report


def _without_duplicates(
    train: list[bytes], test: list[bytes], labels: np.ndarray | None
) -> tuple[np.ndarray, dict[str, Any]]:
    in_test = set(test)
    first: dict[bytes, int] = {}
    keep, leaked, repeated, conflicts = [], [], [], []
    for row, content in enumerate(train):
        if content in in_test:
            leaked.append(row)
        elif content in first:
            repeated.append(row)
            if labels is not None and not np.array_equal(labels[row], labels[first[content]]):
                conflicts.append([first[content], row])
        else:
            first[content] = row
            keep.append(row)
    report = {
        "train_rows": len(train),
        "test_rows": len(test),
        "train_rows_dropped_because_also_in_test": len(leaked),
        "train_rows_dropped_because_repeated": len(repeated),
        "repeated_with_another_label": len(conflicts),
        "test_rows_repeated": len(test) - len(in_test),
        "first_leaked_rows": leaked[:_SHOWN],
        "first_repeated_rows": repeated[:_SHOWN],
        "first_label_conflicts": conflicts[:_SHOWN],
    }
    return np.asarray(keep, dtype=np.int64), report


def _rows(columns: Columns, rows: np.ndarray) -> dict[str, Any]:
    return {name: column[rows] for name, column in columns.items()}


def _divided(
    columns: dict[str, Any], fraction: float, plan: SplitPlan, name: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rest, and a part of about `fraction` of the rows: whole groups, or the same share of every class."""
    count = len(columns[SOURCE_INDEX])
    chosen = np.zeros(count, dtype=np.bool_)
    generator = np.random.default_rng(plan.seed)
    if plan.group_by is not None:
        _, group, sizes = np.unique(columns[plan.group_by], return_inverse=True, return_counts=True)
        order = generator.permutation(len(sizes))
        # Whole groups, as long as they bring the part closer to its size.
        taken = order[np.cumsum(sizes[order]) - sizes[order] / 2 <= fraction * count]
        chosen = np.isin(group, taken)
    else:
        labels = columns[plan.stratify_by] if plan.stratify_by else np.zeros(count)
        shuffled = generator.permutation(count)
        # Systematic sampling along the classes: each gets its share to within one sample, however rare it is.
        along = shuffled[np.argsort(labels[shuffled], kind="stable")]
        marks = np.floor(np.arange(count + 1) * fraction + generator.random())
        chosen[along[np.diff(marks) > 0]] = True
    if chosen.all() or not chosen.any():
        raise DataError(
            f"cannot set a {name} split of {fraction:.1%} of {count:,} samples aside: a split would be empty"
        )
    return _rows(columns, np.flatnonzero(~chosen)), _rows(columns, np.flatnonzero(chosen))


def _assert_disjoint(splits: Mapping[str, Columns], content: tuple[str, ...]) -> None:
    seen: dict[bytes, str] = {}
    for split, columns in splits.items():
        for row_hash in set(content_hashes(columns, content)):
            if seen.setdefault(row_hash, split) != split:
                raise DataError(f"a sample is in both {seen[row_hash]} and {split}; report this as a defect of mlpipes")
