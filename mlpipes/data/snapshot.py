"""The snapshot: split, content-addressed, memory-mapped columns that training and evaluation read.

A snapshot is a published directory `snapshots/<digest>` with one `.npy` file per split and column. Its digest covers
every column of every split, the split plan and the preparation parameters, so scales that need the same data share the
same bytes, and data that differ in anything can never be taken for each other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlpipes.data.dataset import Columns, Dataset, digest_splits
from mlpipes.data.splits import SplitPlan, split_dataset
from mlpipes.errors import CorruptionError
from mlpipes.files import Published, digest_of, open_published, publishing, read_record, set_aside, write_record
from mlpipes.store import Store

KIND = "snapshot"
VERSION = 1


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

    def columns(self, split: str) -> dict[str, np.ndarray]:
        """The memory-mapped, read-only columns of a split."""
        return {
            name: np.load(self.path / f"{split}.{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in self.meta["columns"]
        }


def open_snapshot(path: Path) -> Snapshot:
    """Open a snapshot and verify every byte. Raises FileNotFoundError, or CorruptionError naming the bad file."""
    snapshot = Snapshot(open_published(path, kind=KIND, versions=frozenset({VERSION})))
    if snapshot.meta.get("digest") != path.name:
        raise CorruptionError(
            f"{path} holds the snapshot {snapshot.meta.get('digest')}: it was renamed or copied wrongly"
        )
    return snapshot


def make_snapshot(
    store: Store,
    dataset: Dataset,
    plan: SplitPlan,
    preparation: Mapping[str, Any],
    statistics: Mapping[str, Any],
    splits: Mapping[str, Columns],
    duplicates: Mapping[str, Any],
) -> Snapshot:
    """Write the snapshot of columns that are already split, or open the equal one that is there."""
    identity = {
        "format": VERSION,
        "plan": plan.as_dict(),
        "preparation": dict(preparation),
        "facts": dict(dataset.facts),
        "source": dataset.digest(),
    }
    digest = digest_splits(splits, identity)
    target = store.snapshots / digest
    if not target.is_dir():
        with publishing(target, kind=KIND, version=VERSION) as draft:
            for split, columns in splits.items():
                for name, array in columns.items():
                    np.save(draft.path / f"{split}.{name}.npy", np.ascontiguousarray(array), allow_pickle=False)
            draft.meta.update(
                digest=digest,
                provenance=dataset.provenance.as_dict(),
                facts=dict(dataset.facts),
                counts={split: len(next(iter(columns.values()))) for split, columns in splits.items()},
                columns=sorted(next(iter(splits.values()))),
                statistics=dict(statistics),
                plan=plan.as_dict(),
                preparation=dict(preparation),
                duplicates=dict(duplicates),
                source_digest=identity["source"],
            )
    return open_snapshot(target)


def snapshot_of(store: Store, source_digest: str, workload: Any) -> tuple[Snapshot, list[str]]:
    """The snapshot that a workload needs of a source with a given digest; built only if it is not there yet.

    Also returns warnings: a snapshot found corrupt is set aside as evidence and built again. Raises DataError if the
    source no longer has that digest.
    """
    from mlpipes.errors import DataError

    request = {"source": source_digest, "plan": workload.split.as_dict(), "preparation": workload.preparation}
    pointer = store.snapshots / "requests" / f"{digest_of(request)}.json"
    warnings = []
    try:
        return open_snapshot(store.snapshots / read_record(pointer)["digest"]), warnings
    except FileNotFoundError:
        pass
    except CorruptionError as error:
        evidence = set_aside(
            pointer if str(pointer) in str(error) else store.snapshots / read_record(pointer)["digest"]
        )
        warnings.append(f"{error}. Kept as {evidence.name}; the snapshot is built again.")
    dataset = workload.source.load()
    if dataset.digest() != source_digest:
        raise DataError(
            f"{dataset.provenance.name} changed since its `dataset` asset was materialized "
            f"({source_digest[:12]} then, {dataset.digest()[:12]} now). Materialize `dataset` again."
        )
    prepared = workload.prepare(dataset)
    splits, duplicates = split_dataset(prepared, workload.split)
    statistics = workload.statistics(splits["train"])
    snapshot = make_snapshot(store, prepared, workload.split, workload.preparation, statistics, splits, duplicates)
    write_record(pointer, {"digest": snapshot.digest})
    return snapshot, warnings
