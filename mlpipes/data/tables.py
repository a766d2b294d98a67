"""Tables of texts: csv, tsv, jsonl, parquet or a Hugging Face data set, with the roles of columns found or given."""

import csv
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlpipes.data.dataset import Dataset, Provenance
from mlpipes.data.ragged import Ragged
from mlpipes.errors import DataError

Task = Literal["classification", "regression"]
LABEL_NAMES = ("label", "labels", "target", "class", "category", "score", "sentiment", "stars", "rating", "y")
INDEX_NAMES = ("idx", "index", "id", "guid", "uid", "key", "")
_READERS = {".csv": "csv", ".tsv": "csv", ".txt": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


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

    Columns are found by `infer_roles` unless they are given. Rows without a text or a label are dropped and counted, and
    so are test rows whose label does not occur in training.
    """

    train: str
    """A file, or a data set's name on the hub."""
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

    def load(self) -> Dataset:
        """Columns `text` (and `text_pair`), ragged UTF-8, and `label`: int64 class numbers, or float64. Raises DataError."""
        from_hub = not Path(self.train).expanduser().is_file() and not Path(self.train).suffix
        tables, names = self._from_hub() if from_hub else self._from_files()
        given = {"text": self.text, "text_pair": self.text_pair, "label": self.label, "task": self.task}
        roles = infer_roles(tables["train"], **{key: value for key, value in given.items() if value is not None})
        known, splits, dropped = None, {}, {}
        for split, table in tables.items():
            splits[split], known, dropped[split] = _columns(f"{self.train}, {split}", table, roles, names, known)
        classes = known if roles.task == "classification" else None
        return Dataset(
            splits=splits,
            provenance=Provenance(
                name=f"{self.train}{f' ({self.config})' if self.config else ''}",
                licence=self.licence,
                origin=self.origin or ("Hugging Face hub" if from_hub else "local files"),
                fidelity=self.fidelity,
                notes=f"columns {roles.as_dict()}; rows dropped {dropped}",
            ),
            facts={"roles": roles.as_dict(), "dropped": dropped} | ({"class_names": classes} if classes else {}),
        )

    def _from_files(self) -> tuple[dict[str, Mapping[str, Sequence[Any]]], list[str] | None]:
        files = {"train": self.train} | ({"test": self.test} if self.test else {})
        return {split: _read(Path(path).expanduser()) for split, path in files.items()}, None

    def _from_hub(self) -> tuple[dict[str, Mapping[str, Sequence[Any]]], list[str] | None]:
        from mlpipes.data.hub import load_hub_dataset

        found = load_hub_dataset(self.train, self.config)
        wanted = {"train": "train"} | ({"test": self.test} if self.test else {})
        if missing := [split for split in wanted.values() if split not in found]:
            raise DataError(f"{self.train} has no split {missing[0]!r}; it has {', '.join(map(repr, found))}")
        features = found["train"].features
        roles = [name for name in (self.label, *LABEL_NAMES) if name in features and hasattr(features[name], "names")]
        names = list(features[roles[0]].names) if roles else None
        return {split: found[source].to_dict() for split, source in wanted.items()}, names


def infer_roles(table: Mapping[str, Sequence[Any]], **given: Any) -> Roles:
    """The roles of a table's columns, as far as they are not given. Raises DataError listing the candidates if in doubt."""
    columns = {name: values for name, values in table.items() if name.lower() not in INDEX_NAMES}
    for role in ("text", "text_pair", "label"):
        if given.get(role) is not None and given[role] not in table:
            raise DataError(f"there is no column {given[role]!r} for {role}; there are {', '.join(map(repr, table))}")
    label = given.get("label") or _the_label(columns, [given.get("text"), given.get("text_pair")])
    texts = [name for name, values in columns.items() if name != label and _is_text(values)]
    if "text" in given:
        chosen = [given["text"], given.get("text_pair")]
    elif len(texts) in (1, 2):
        chosen = [*texts, None][:2]
    else:
        listed = ", ".join(map(repr, texts)) or "none"
        raise DataError(
            f"which column is the text? Candidates: {listed}, of the columns {', '.join(map(repr, table))}. Say it with "
            "text=… (and text_pair=…)."
        )
    return Roles(chosen[0], label, chosen[1], given.get("task") or _the_task(label, table[label]))


def _the_label(columns: Mapping[str, Sequence[Any]], taken: Sequence[str | None]) -> str:
    candidates = [name for name in columns if name not in taken]
    named = [name for name in candidates if name.lower() in LABEL_NAMES]
    # Without a telling name: what repeats itself, or is a number.
    likely = named or [name for name in candidates if not _is_text(columns[name])]
    if len(likely) == 1:
        return likely[0]
    raise DataError(
        f"which column is the label? Candidates: {', '.join(map(repr, likely)) or 'none'}, of the columns "
        f"{', '.join(map(repr, columns))}. Say it with label=…"
    )


def _is_text(values: Sequence[Any]) -> bool:
    some = [value for value in values[:2000] if value not in (None, "")]
    if not some or not all(isinstance(value, str) for value in some):
        return False
    words = sum(len(value.split()) for value in some) / len(some)
    return words >= 3 or len(set(some)) > 0.5 * len(some)


def _the_task(label: str, values: Sequence[Any]) -> Task:
    known = [value for value in values if not _is_missing(value)]
    if any(isinstance(value, str) for value in known) or all(isinstance(value, bool | int) for value in known):
        if len(known) > 20 and len(set(known)) > 0.5 * len(known):
            raise DataError(
                f"the label column {label!r} has {len(set(known)):,} distinct values in {len(known):,} rows: it looks like "
                "no class. Say task='classification' or 'regression', or choose another column with label=…"
            )
        return "classification"
    return "classification" if all(float(value).is_integer() for value in known) else "regression"


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and np.isnan(value))


def _columns(
    where: str, table: Mapping[str, Sequence[Any]], roles: Roles, names: list[str] | None, known: list[str] | None
) -> tuple[dict[str, Any], list[str], dict[str, int]]:
    """A split's columns, the class names (those of training for every split), and how many rows were dropped for what."""
    for name in (roles.text, roles.text_pair, roles.label):
        if name is not None and name not in table:
            raise DataError(f"{where}: there is no column {name!r}; there are {', '.join(map(repr, table))}")
    count = len(table[roles.label])
    dropped = {"without label": 0, "without text": 0, "label unseen in training": 0}
    labels, keep = [_text_of(value, roles, names) for value in table[roles.label]], []
    if known is None:
        known = _class_names([label for label in labels if label is not None], roles, names, where)
    numbers = {name: number for number, name in enumerate(known)}
    for row in range(count):
        label = labels[row]
        parts = [table[name][row] for name in (roles.text, roles.text_pair) if name is not None]
        if label is None:
            dropped["without label"] += 1
        elif any(not isinstance(part, str) or not part.strip() for part in parts):
            dropped["without text"] += 1
        elif roles.task == "classification" and label not in numbers:
            dropped["label unseen in training"] += 1
        else:
            keep.append(row)
    if not keep:
        raise DataError(f"{where}: no row of {count:,} has both text and label (dropped: {dropped})")
    columns: dict[str, Any] = {"text": Ragged.of_texts(table[roles.text][row] for row in keep)}
    if roles.text_pair is not None:
        columns["text_pair"] = Ragged.of_texts(table[roles.text_pair][row] for row in keep)
    if roles.task == "classification":
        columns["label"] = np.array([numbers[str(labels[row])] for row in keep], dtype=np.int64)
    else:
        columns["label"] = np.array([float(str(labels[row])) for row in keep], dtype=np.float64)
    return columns, known, dropped


def _text_of(value: Any, roles: Roles, names: list[str] | None) -> str | None:
    """A label as text; None if there is none, which data sets with hidden labels say with -1."""
    if _is_missing(value):
        return None
    if names is not None:
        return names[value] if value >= 0 else None
    if roles.task == "regression":
        try:
            return repr(float(value))
        except ValueError as error:
            raise DataError(f"the label {value!r} in column {roles.label!r} is no number") from error
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _class_names(labels: Sequence[str], roles: Roles, names: list[str] | None, where: str) -> list[str]:
    """Class names in a stable order: the data set's own, numbers by value, anything else by the alphabet."""
    if roles.task == "regression":
        return []
    found = set(labels)
    if len(found) < 2:
        raise DataError(
            f"{where}: column {roles.label!r} has {len(found)} class ({', '.join(found)}); nothing to learn"
        )
    if names is not None:
        return names
    return sorted(found, key=lambda name: (0, int(name), "") if name.lstrip("-").isdigit() else (1, 0, name))


def _read(path: Path) -> Mapping[str, Sequence[Any]]:
    """A table as columns of Python values. Raises DataError naming the file."""
    import datasets

    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} has an unknown type; known are {', '.join(_READERS)}")
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    options: dict[str, Any] = {}
    if reader == "csv":
        # Nothing but an empty cell is missing: "NA" and "null" are words. In tab-separated files quotes are only quotes.
        options = {"keep_default_na": False, "na_values": [""]}
        if path.suffix.lower() != ".csv":
            options |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory(prefix="mlpipes-table-") as cache:
            found: Any = datasets.load_dataset(reader, data_files=str(path), split="train", cache_dir=cache, **options)
            return found.to_dict()
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(f"{path} cannot be read as {reader}: {type(cause).__name__}: {str(cause)[:300]}") from error
    finally:
        if shown:
            datasets.enable_progress_bars()


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
    return replace(described, train=str(folder / "train.tsv"), test=str(folder / "dev.tsv"), config=None)
