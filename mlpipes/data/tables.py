"""Tables of texts: csv, tsv, JSON, Parquet or a Hugging Face data set, with the roles of columns found or given."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlpipes.data.cells import Cell, Foreign, RawTable, cell_of, is_blank
from mlpipes.data.dataset import Dataset, Provenance
from mlpipes.data.labels import Classes, Task, numbers, task_of, written_labels
from mlpipes.data.ragged import Ragged
from mlpipes.data.table_files import READABLE, Reading, arrow_table, read_table
from mlpipes.data.table_roles import find_columns
from mlpipes.errors import DataError

_HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]{1,5}")
_FILE_SUFFIXES = (
    *READABLE, ".gz", ".zip", ".bz2", ".xz", ".zst", ".xls", ".xlsx", ".ods", ".feather", ".arrow", ".xml", ".html",
    ".pkl", ".dat", ".data", ".db", ".sqlite", ".h5", ".tab", ".psv",
)  # fmt: skip


@dataclass(frozen=True)
class Roles:
    """Which column is what, and what is to be predicted."""

    text: str
    label: str
    text_pair: str | None = None
    task: Task = "classification"

    def as_dict(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return {"text": self.text, "text_pair": self.text_pair, "label": self.label, "task": self.task}


@dataclass(frozen=True)
class TableSource:
    """Texts and labels from local files, or from a data set of the Hugging Face hub (through its cache).

    All cells are read as text, and every row must fit the header. Columns are found by `infer_roles` unless they are
    given. Rows without a text or a label are dropped and counted, and so are a few test rows whose label does not occur in
    training. What is a class, a number or missing is in `mlpipes.data.labels`.
    """

    train: str
    """A file (csv, tsv, jsonl, json, parquet; also .gz), or a data set's name on the hub."""
    test: str | None = None
    """A file; or, of a data set on the hub, the split to test on. None: a test split is taken from training."""
    config: str | None = None
    """The configuration of a data set on the hub."""
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    task: Task | None = None
    licence: str = "not stated"
    origin: str = ""
    fidelity: str = "complete, as found"
    class_names: Sequence[str] | None = None
    """The classes in order: those that labels name, or that labels number from 0. None: those found in training."""
    columns: Sequence[str] | None = None
    """The names of the columns of files that have no header."""
    delimiter: str | None = None
    """What separates cells. None: that of comma, semicolon, tab and bar with which every row fits the header."""
    quoting: bool | None = None
    """Whether quotes wrap cells (True) or are characters (False). None: what fits; an error if both do and differ."""
    encoding: str | None = None
    """The encoding of files without a mark of byte order. None: UTF-8."""

    def load(self) -> Dataset:
        """Columns `text` (and `text_pair`), ragged UTF-8, and `label`: int64 class numbers, or float64. Raises DataError."""
        import numpy as np

        self._check()
        from_hub = is_hub_name(self.train)
        tables = self._from_hub() if from_hub else self._from_files()
        train, wheres = tables["train"], self._wheres(from_hub)
        with _in(wheres["train"]):
            text, pair, label = find_columns(train.columns, self.text, self.text_pair, self.label)
        for split, table in tables.items():
            if absent := [name for name in (text, pair, label) if name is not None and name not in table.columns]:
                listed = ", ".join(map(repr, table.columns))
                raise DataError(f"{wheres[split]}: there is no column {absent[0]!r}; there are {listed}")
        names = self.class_names or train.class_names.get(label)
        with _in(" and ".join(wheres[split] for split in tables)):
            labels = written_labels(label, {split: table.columns[label] for split, table in tables.items()}, names)
            task = self.task or ("classification" if names else task_of(label, labels))
        classes = None
        if task == "classification":
            classes = Classes(label, wheres["train"], labels, names, by_number=self.class_names is not None)
        splits, dropped = {}, {}
        for split, table in tables.items():
            texts = {"text": _texts(table, text, wheres[split])}
            if pair is not None:
                texts["text_pair"] = _texts(table, pair, wheres[split])
            with _in(wheres[split]):
                values = classes.numbers(labels[split]) if classes else numbers(label, labels[split])
                keep, dropped[split] = _kept(list(texts.values()), labels[split], values)
            splits[split] = {name: Ragged.of_texts(str(cells[row]) for row in keep) for name, cells in texts.items()}
            kind = np.int64 if classes else np.float64
            splits[split]["label"] = np.array([values[row] for row in keep], dtype=kind)
        roles = Roles(text, label, pair, task)
        return Dataset(
            splits=splits,
            provenance=Provenance(
                name=f"{self.train}{f' ({self.config})' if self.config else ''}",
                licence=self.licence,
                origin=self.origin or ("Hugging Face hub" if from_hub else "local files"),
                fidelity=self.fidelity,
                notes=f"columns {roles.as_dict()}; rows dropped {dropped}; read as "
                + "; ".join(f"{split}: {table.how}" for split, table in tables.items()),
            ),
            facts={"roles": roles.as_dict(), "dropped": dropped} | ({"class_names": classes.names} if classes else {}),
        )

    def _check(self) -> None:
        """Raises DataError for settings that cannot be meant."""
        if self.task not in (None, "classification", "regression"):
            raise DataError(f"task={self.task!r}: it is 'classification' or 'regression'")
        for name in ("train", "test", "config", "text", "text_pair", "label", "delimiter", "encoding"):
            if not isinstance(value := getattr(self, name), str) and (value is not None or name == "train"):
                raise DataError(f"{name}={value!r}: write it as text (str), not as {type(value).__name__}")
        if not isinstance(self.quoting, bool | None):
            raise DataError(f"quoting={self.quoting!r}: it is True, False or None")
        for name, value in (("class_names", self.class_names), ("columns", self.columns)):
            if value is None:
                continue
            # A set has no order.
            if not isinstance(value, list | tuple) or not all(
                isinstance(one, str) and one.strip() == one and one for one in value
            ):
                raise DataError(f"{name}={value!r}: it must be a list of names, without blanks around them")
            if len(set(value)) != len(value) or len(value) < 2:
                raise DataError(f"{name}={list(value)!r}: at least two names are needed, each once")
        if self.class_names is not None and self.task == "regression":
            raise DataError("class_names= is for classes, but task='regression' is given; leave one of them out")

    def _wheres(self, from_hub: bool) -> dict[str, str]:
        """Where each split is, for messages."""
        if from_hub:
            return {"train": f"{self.train}, split 'train'", "test": f"{self.train}, split {self.test!r}"}
        return {"train": self.train, "test": str(self.test)}

    def _from_files(self) -> dict[str, RawTable]:
        if self.config is not None:
            raise DataError(
                f"config={self.config!r} is for data sets of the hub, but {self.train!r} names a local file"
            )
        files = {"train": self.train} | ({"test": self.test} if self.test is not None else {})
        roles = [name for name in (self.text, self.text_pair, self.label) if name is not None]
        reading = Reading(self.delimiter, self.quoting, self.encoding, self.columns, roles)
        return {split: read_table(Path(path), reading) for split, path in files.items()}

    def _from_hub(self) -> dict[str, RawTable]:
        from mlpipes.data.hub import load_hub_dataset

        found = load_hub_dataset(self.train, self.config)
        wanted = {"train": "train"} | ({"test": self.test} if self.test is not None else {})
        if missing := [split for split in wanted.values() if split not in found]:
            raise DataError(f"{self.train} has no split {missing[0]!r}; it has {', '.join(map(repr, found))}")
        tables = {}
        for split, source in wanted.items():
            features = found[source].features
            classes = {n: list(f.names) for n, f in features.items() if type(f).__name__ == "ClassLabel" and f.names}
            arrow = found[source].with_format("arrow")[:]
            tables[split] = arrow_table(arrow, classes, f"{self.train}, split {source!r}")
        return tables


def is_hub_name(name: str) -> bool:
    """Whether a name is one of the hub's (`glue`, `org/name`, `org/x-v1.1`) and not that of a file, there or not."""
    if not _HUB_NAME.fullmatch(name) or len(name) > 96 or ".." in name or "--" in name or Path(name).exists():
        return False
    suffix = Path(name).suffix.lower()
    # Names on the hub that have no owner have no dots but those of versions.
    return suffix not in _FILE_SUFFIXES and ("/" in name or not _FILE_SUFFIX.fullmatch(suffix))


def infer_roles(table: Mapping[str, Sequence[Any]], **given: Any) -> Roles:
    """The roles of a table's columns, as far as they are not given. Raises DataError listing the candidates if in doubt."""
    columns = {name: [cell_of(value) for value in values] for name, values in table.items()}
    text, pair, label = find_columns(columns, given.get("text"), given.get("text_pair"), given.get("label"))
    task = given.get("task") or task_of(label, written_labels(label, {"train": columns[label]}, None))
    return Roles(text, label, pair, task)


def _texts(table: RawTable, column: str, where: str) -> Sequence[Cell]:
    """A column of texts. Raises DataError for cells that are none."""
    cells = table.columns[column]
    for row, cell in enumerate(cells, 1):
        if isinstance(cell, Foreign):
            raise DataError(
                f"{where}: the text column {column!r} holds values of type {cell.kind} (row {row}). Name another column "
                "with text=…, or write what is meant as text"
            )
        if cell is not None and not cell.isascii():
            try:
                cell.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{where}: the text in column {column!r}, row {row}, has half a character "
                    f"({cell[error.start : error.end]!r}), which no encoding can write. Mend it"
                ) from error
    return cells


def _kept(
    texts: Sequence[Sequence[Cell]], labels: Sequence[str | None], values: Sequence[float | None]
) -> tuple[list[int], dict[str, int]]:
    """The numbers of a split's rows that have all it takes, and how many have been dropped for what."""
    dropped = {"without label": 0, "without text": 0, "label unseen in training": 0}
    keep = []
    for row, (label, value) in enumerate(zip(labels, values, strict=True)):
        if label is None:
            dropped["without label"] += 1
        elif any(is_blank(cells[row]) for cells in texts):
            dropped["without text"] += 1
        elif value is None:
            dropped["label unseen in training"] += 1
        else:
            keep.append(row)
    if not keep:
        raise DataError(f"no row of {len(labels):,} has both text and label (dropped: {dropped})")
    return keep, dropped


@contextmanager
def _in(where: str) -> Iterator[None]:
    """Errors in here say where."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def sst2_source(folder: Path | None) -> TableSource:
    """GLUE SST-2: from `train.tsv` and `dev.tsv` of a folder, or from the hub. Its labelled dev split is the test split."""
    described = TableSource(
        "nyu-mll/glue",
        test="validation",
        config="sst2",
        text="sentence",
        label="label",
        licence="not stated",
        origin="Socher et al. 2013, Stanford Sentiment Treebank; GLUE (Wang et al. 2019)",
        fidelity="complete; evaluated on GLUE's dev split, because the labels of its test split are hidden",
    )
    if folder is None:
        return described
    # GLUE's files take quotes for characters.
    return replace(described, train=str(folder / "train.tsv"), test=str(folder / "dev.tsv"), config=None, quoting=False)
