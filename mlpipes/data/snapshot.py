"""The snapshot: split, content-addressed, memory-mapped columns that training and evaluation read.

A snapshot is a published directory `snapshots/<digest>` with one `.npy` file per split and column (two for a ragged one),
and `files/` that belong to the data, such as a tokenizer. Its digest covers every column of every split, the files, the
statistics, the split plan and the preparation parameters, so scales that need the same data share the same bytes, and data
that differ in anything can never be taken for each other. A request (source, plan, preparation and its code) points to the
digest that it led to, so that nothing is prepared twice; another request may lead to the same digest.
"""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from mlpipes.data.dataset import Columns, Dataset, check_columns, check_json, digest_splits, rows_digest
from mlpipes.data.ragged import Ragged, arrays_of
from mlpipes.data.splits import SplitPlan, content_columns, content_hashes, split_dataset
from mlpipes.errors import CorruptionError, FormatError
from mlpipes.store.files import (
    Published,
    digest_of,
    open_published,
    publishing,
    quarantine,
    read_record,
    sha256_file,
    write_record,
)
from mlpipes.store.layout import Store

KIND = "snapshot"
VERSION = 3
"""Since 3 the digest covers the statistics; what is inside is as it was."""
READABLE = frozenset({2, VERSION})
"""Formats that can be opened: models that were trained on older ones are still served and compared with."""
FILES = "files"
MANY_DUPLICATES = 0.05
"""A greater share of a split's rows that repeat others is worth a warning."""


@dataclass(frozen=True)
class Snapshot:
    """A verified snapshot."""

    published: Published

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.published.path

    @property
    def digest(self) -> str:
        """Its content address (SHA-256, hex)."""
        return self.published.path.name

    @property
    def meta(self) -> dict[str, Any]:
        """Provenance, counts, facts, statistics, split plan, duplicates."""
        return self.published.meta

    @property
    def facts(self) -> dict[str, Any]:
        """What the source tells beyond its columns, such as `class_names`."""
        return self.meta["facts"]

    @property
    def counts(self) -> dict[str, int]:
        """Samples in each split."""
        return self.meta["counts"]

    @property
    def files(self) -> Path:
        """The folder of the files that belong to the data; it is there only if there are any."""
        return self.path / FILES

    def rows(self, split: str) -> str:
        """`rows_digest` of a split as the source gave it, before any preparation.

        Older snapshots did not note it: theirs is taken from what they hold. Where that lacks the content, it is the
        snapshot's own digest, which equals no other.
        """
        if (noted := self.meta.get("rows", {}).get(split)) is not None:
            return noted
        # Only a plan that names its content tells it from what a preparation has added.
        content = self.meta["plan"]["content"]
        if not content or not set(content) <= set(self.meta["columns"]):
            return self.digest
        return rows_digest(self.columns(split), content)

    def columns(self, split: str) -> dict[str, Any]:
        """The memory-mapped, read-only columns of a split."""

        def read(name: str) -> np.ndarray:
            return np.load(self.path / f"{split}.{name}.npy", mmap_mode="r", allow_pickle=False)

        return {
            name: Ragged(read(f"{name}.values"), read(f"{name}.offsets")) if name in self.meta["ragged"] else read(name)
            for name in self.meta["columns"]
        }


def open_snapshot(path: Path) -> Snapshot:
    """Open a snapshot and verify every byte.

    Raises FileNotFoundError, FormatError, or CorruptionError naming the bad file and the way out.
    """
    try:
        return _opened(path)
    except CorruptionError as error:
        raise CorruptionError(
            f"the snapshot is corrupt: {str(error).rstrip('.')}. Materialize `snapshot` and what follows it again: it is "
            "rebuilt, what is corrupt is kept as evidence, and the training resumes from its last checkpoint."
        ) from error


def _opened(path: Path) -> Snapshot:
    snapshot = Snapshot(open_published(path, kind=KIND, versions=READABLE))
    if snapshot.meta.get("digest") != path.name:
        raise CorruptionError(f"{path} holds {snapshot.meta.get('digest')}: it was renamed or copied wrongly")
    return snapshot


def shared_between_splits(snapshot: Snapshot) -> dict[tuple[str, str], int]:
    """How many different samples are in both of each two splits, by the content that tells samples apart."""
    columns = snapshot.meta["columns"]
    # Those of the plan as far as the preparation has left them there.
    names = content_columns(tuple(name for name in snapshot.meta["plan"]["content"] if name in columns), columns)
    contents = {split: set(content_hashes(snapshot.columns(split), names)) for split in snapshot.counts}
    return {(a, b): len(contents[a] & contents[b]) for a, b in combinations(contents, 2)}


def warnings_of(snapshot: Snapshot) -> list[str]:
    """What a person should know of a snapshot before training on it."""
    return [*filter(None, [duplicates_warning(snapshot)]), *snapshot.facts.get("warnings", ())]


def duplicates_warning(snapshot: Snapshot) -> str | None:
    """What to tell about a snapshot of whose source many rows are there more than once; None of any other, or an old one."""
    found = snapshot.meta["duplicates"]
    repeated, leaked, again = (
        found.get(name, 0)
        for name in (
            "train_rows_dropped_because_repeated",
            "train_rows_dropped_because_also_in_test",
            "test_rows_repeated",
        )
    )
    train, test = found.get("train_rows", 0), found.get("test_rows", 0)
    told = []
    if repeated + leaked > MANY_DUPLICATES * train > 0:
        told.append(
            f"{repeated + leaked:,} of {train:,} training rows were dropped: {repeated:,} repeat another, {leaked:,} are in "
            "the test split, too"
        )
    if again > MANY_DUPLICATES * test > 0:
        told.append(f"{again:,} of {test:,} test rows repeat another, and stay")
    if not told:
        return None
    content = ", ".join(content_columns(tuple(snapshot.meta["plan"]["content"]), snapshot.meta["columns"]))
    return f"{'; '.join(told)}. Rows are the same if they have the same {content} (`content` of the split plan)."


@dataclass(frozen=True)
class Prepared:
    """Split columns turned into what a model reads, and what else it must have with them."""

    splits: Mapping[str, Columns]
    facts: Mapping[str, Any]
    """The source's facts and what the preparation adds; JSON. `warnings`, texts, are told each time it is materialized."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Files to keep with the data, by their name in the snapshot (which may hold slashes)."""


def make_snapshot(
    store: Store,
    dataset: Dataset,
    plan: SplitPlan,
    preparation: Mapping[str, Any],
    statistics: Mapping[str, Any],
    prepared: Prepared,
    duplicates: Mapping[str, Any],
    rows: Mapping[str, str],
) -> Snapshot:
    """Write the snapshot of columns that are already split, or open the equal one that is there.

    `rows` is the `rows_digest` of each split before its preparation. Raises DataError for what a model cannot read.
    """
    splits = prepared.splits
    for split, columns in splits.items():
        check_columns(f"{dataset.provenance.name}, {split}, as prepared", columns, kinds="biuf")
    check_json(f"{dataset.provenance.name}: facts and statistics", [dict(prepared.facts), dict(statistics)])
    identity = {
        "format": VERSION,
        "plan": plan.as_dict(),
        "preparation": dict(preparation),
        "facts": dict(prepared.facts),
        "files": {name: sha256_file(path) for name, path in prepared.files.items()},
        "statistics": dict(statistics),
        "source": dataset.digest(),
    }
    digest = digest_splits(splits, identity)
    target = store.snapshots / digest
    if not target.is_dir():
        with publishing(target, kind=KIND, version=VERSION) as draft:
            for split, columns in splits.items():
                for column, content in columns.items():
                    for name, array in arrays_of(column, content).items():
                        np.save(draft.path / f"{split}.{name}.npy", np.ascontiguousarray(array), allow_pickle=False)
            for name, path in prepared.files.items():
                (draft.path / FILES / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, draft.path / FILES / name)
            first = next(iter(splits.values()))
            draft.meta.update(
                digest=digest,
                provenance=dataset.provenance.as_dict(),
                facts=dict(prepared.facts),
                counts={split: len(next(iter(columns.values()))) for split, columns in splits.items()},
                columns=sorted(first),
                ragged=sorted(name for name, column in first.items() if isinstance(column, Ragged)),
                statistics=dict(statistics),
                plan=plan.as_dict(),
                preparation=dict(preparation),
                duplicates=dict(duplicates),
                rows=dict(rows),
                source_digest=identity["source"],
            )
    return open_snapshot(target)


def snapshot_of(
    store: Store, source_digest: str, workload: Any, code: str = "", loaded: Dataset | None = None
) -> tuple[Snapshot, list[str]]:
    """The snapshot that a workload needs of a source with a given digest; built only if it is not there yet.

    `code` is the digest of the code that builds it (`preparation_version`); it may be empty where the store does not
    outlive the code. A source that is `loaded` is not loaded again. Also returns warnings: a corrupt snapshot is
    quarantined as evidence and rebuilt. Raises DataError if the source no longer has that digest.
    """
    from mlpipes.errors import DataError

    preparation = workload.preparation  # once: it may digest files of some size
    request = {
        "format": VERSION,
        "source": source_digest,
        "plan": workload.split.as_dict(),
        "preparation": preparation,
        "code": code,
    }
    pointer = store.snapshots / "requests" / f"{digest_of(request)}.json"
    warnings = []
    try:
        return _opened(store.snapshots / read_record(pointer)["digest"]), warnings
    except (FileNotFoundError, FormatError):
        pass
    except CorruptionError as error:
        evidence = quarantine(
            pointer if str(pointer) in str(error) else store.snapshots / read_record(pointer)["digest"]
        )
        warnings.append(f"{str(error).rstrip('.')}. Kept as {evidence.name}; the snapshot is built again.")
    dataset = workload.source.load() if loaded is None else loaded
    if dataset.digest() != source_digest:
        raise DataError(
            f"{dataset.provenance.name} changed since its `dataset` asset was materialized "
            f"({source_digest[:12]} then, {dataset.digest()[:12]} now). Materialize `dataset` again."
        )
    splits, duplicates = split_dataset(dataset, workload.split)
    content = content_columns(workload.split.content, splits["test"])
    rows = {name: rows_digest(columns, content) for name, columns in splits.items()}
    with tempfile.TemporaryDirectory(prefix="mlpipes-prepare-") as scratch:
        prepared = workload.prepare(splits, dataset.facts, Path(scratch))
        statistics = workload.statistics(prepared.splits["train"])
        snapshot = make_snapshot(store, dataset, workload.split, preparation, statistics, prepared, duplicates, rows)
    write_record(pointer, {"digest": snapshot.digest})
    return snapshot, warnings
