import multiprocessing as mp
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlpipes.data.dataset import Dataset
from mlpipes.data.snapshot import Prepared, Snapshot, open_snapshot, snapshot_of
from mlpipes.data.sources import Cifar10Source, DigitsSource
from mlpipes.data.splits import SplitPlan, content_hashes, split_dataset
from mlpipes.errors import CorruptionError, DataError, FormatError
from mlpipes.store.layout import Store
from mlpipes_tests.conftest import tiny_dataset

PLAN = SplitPlan(0.1, test_fraction=0.2, stratify_by="label")


class TinyWorkload:
    """As much of a workload as a snapshot needs."""

    preparation: dict[str, Any] = {}  # noqa: RUF012 - never written to

    def __init__(self, dataset: Dataset, split: SplitPlan = PLAN) -> None:
        self.dataset, self.split, self.source = dataset, split, self

    def load(self) -> Dataset:
        return self.dataset

    def prepare(self, splits: Any, facts: Any, scratch: Path) -> Prepared:
        return Prepared(splits, facts)

    def statistics(self, train: Any) -> dict[str, Any]:
        return {"mean": float(train["image"].mean())}


def make(root: Path, dataset: Dataset | None = None, split: SplitPlan = PLAN) -> Snapshot:
    dataset = dataset or tiny_dataset()
    return snapshot_of(Store(root), dataset.digest(), TinyWorkload(dataset, split))[0]


def test_equal_requests_share_bytes_and_different_ones_do_not(tmp_path: Path) -> None:
    first, second = make(tmp_path), make(tmp_path)
    assert first.path == second.path
    dataset = tiny_dataset()
    relabelled = {**dataset.splits["train"], "label": np.roll(dataset.splits["train"]["label"], 3).copy()}
    relabelled["label"][0] = 2
    digests = {
        first.digest,
        make(tmp_path, split=replace(PLAN, seed=1)).digest,
        make(tmp_path, split=replace(PLAN, validation_fraction=0.15)).digest,
        make(tmp_path, replace(dataset, splits={"train": relabelled})).digest,
        make(tmp_path, replace(dataset, facts={**dataset.facts, "pixel_maximum": 255})).digest,
    }
    assert len(digests) == 5


class Counted(TinyWorkload):
    """Knows how often it was prepared, and may give other statistics, or say that it prepares otherwise."""

    def __init__(self, **statistics: float) -> None:
        super().__init__(tiny_dataset())
        self.given, self.prepared = statistics, 0

    def prepare(self, splits: Any, facts: Any, scratch: Path) -> Prepared:
        self.prepared += 1
        return super().prepare(splits, facts, scratch)

    def statistics(self, train: Any) -> dict[str, Any]:
        return super().statistics(train) | self.given


def test_statistics_count_in_the_digest(tmp_path: Path) -> None:
    digest = tiny_dataset().digest()
    found = [snapshot_of(Store(tmp_path / str(n)), digest, Counted(std=n))[0] for n in (1.0, 2.0)]
    assert found[0].digest != found[1].digest
    assert [snapshot.meta["statistics"]["std"] for snapshot in found] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"statistics": {"mean": float("nan")}}, "facts and statistics cannot be kept as JSON"),
        ({"statistics": {"mean": np.zeros(3)}}, "facts and statistics cannot be kept as JSON"),
        ({"column": np.array(["a"] * 1000)}, "train, as prepared: the column 'name' holds <U1; it must hold numbers"),
        ({"column": np.zeros(3)}, "train, as prepared: each column must have one row a sample"),
    ],
)
def test_what_a_model_cannot_read_is_no_snapshot(tmp_path: Path, wrong: Any, said: str) -> None:
    class Wrong(TinyWorkload):
        def prepare(self, splits: Any, facts: Any, scratch: Path) -> Prepared:
            column = {"name": wrong["column"][: len(splits["train"]["label"])]} if "column" in wrong else {}
            return Prepared(splits | {"train": splits["train"] | column}, facts)

        def statistics(self, train: Any) -> dict[str, Any]:
            return wrong.get("statistics", {})

    workload = Wrong(tiny_dataset())
    with pytest.raises(DataError, match=said):
        snapshot_of(Store(tmp_path), workload.source.load().digest(), workload)
    assert not list((tmp_path / "snapshots").glob("*"))


def test_another_code_prepares_again_and_equal_bytes_are_the_same_snapshot(tmp_path: Path) -> None:
    store, workload = Store(tmp_path), Counted()

    def made(code: str, given: Counted = workload) -> str:
        return snapshot_of(store, workload.load().digest(), given, code)[0].digest

    first = made("a")
    assert (made("a"), workload.prepared) == (first, 1), "the same request is answered without preparing"
    assert (made("b"), workload.prepared) == (first, 2)
    assert (made("a"), made("b"), workload.prepared) == (first, first, 2)
    assert made("c", Counted(std=1.0)) != first, "code that gives other statistics gives another snapshot"
    assert len([path for path in store.snapshots.iterdir() if path.name != "requests"]) == 2


@pytest.mark.parametrize(("version", "readable"), [(1, False), (2, True), (3, True), (4, False)])
def test_snapshots_of_the_version_before_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, readable: bool
) -> None:
    with monkeypatch.context() as then:
        then.setattr("mlpipes.data.snapshot.READABLE", frozenset({version}))
        then.setattr("mlpipes.data.snapshot.VERSION", version)
        path = make(tmp_path).path
    if readable:
        assert open_snapshot(path).counts["train"] == 84
    else:
        with pytest.raises(FormatError, match=f"a snapshot of format {version}, and this version reads 2, 3"):
            open_snapshot(path)


def test_every_column_counts_in_a_data_sets_digest() -> None:
    dataset = tiny_dataset()
    for column in ("image", "label"):
        changed = {name: array.copy() for name, array in dataset.splits["train"].items()}
        changed[column].reshape(-1)[-1] += 1
        assert replace(dataset, splits={"train": changed}).digest() != dataset.digest()


def test_splits_are_disjoint_stratified_seeded_and_memory_mapped(tmp_path: Path) -> None:
    snapshot = make(tmp_path)
    assert snapshot.counts == {"train": 84, "validation": 12, "test": 24}
    seen: set[bytes] = set()
    for split, count in snapshot.counts.items():
        columns = snapshot.columns(split)
        assert isinstance(columns["image"], np.memmap)
        assert np.bincount(columns["label"]).tolist() == [count // 3] * 3
        hashes = set(content_hashes(columns, ("image",)))
        assert len(hashes) == count
        assert not hashes & seen
        seen |= hashes
    with pytest.raises(ValueError, match="read-only"):
        snapshot.columns("train")["image"][0] = 0
    again, _ = split_dataset(tiny_dataset(), PLAN)
    assert np.array_equal(again["test"]["source_index"], snapshot.columns("test")["source_index"])
    other, _ = split_dataset(tiny_dataset(), replace(PLAN, seed=1))
    assert not np.array_equal(other["test"]["source_index"], snapshot.columns("test")["source_index"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 119), max_size=30), st.integers(0, 5))
def test_planted_duplicates_are_dropped_and_reported(sources: list[int], leaks: int) -> None:
    train = {name: array.copy() for name, array in tiny_dataset().splits["train"].items()}
    train = {name: np.concatenate([array, array[sources]]) for name, array in train.items()}
    test = {name: array.copy() for name, array in tiny_dataset(30, seed=9).splits["train"].items()}
    for row in range(leaks):  # the same picture in train and test
        test["image"][row] = train["image"][row]
    dataset = replace(tiny_dataset(), splits={"train": train, "test": test})
    splits, report = split_dataset(dataset, SplitPlan(0.1, stratify_by="label", content=("image",)))
    leaked = set(range(leaks))
    assert report["train_rows_dropped_because_also_in_test"] == leaks + sum(s in leaked for s in sources)
    assert report["train_rows_dropped_because_repeated"] == sum(s not in leaked for s in sources)
    assert len(splits["test"]["label"]) == 30
    hashes = [set(content_hashes(columns, ("image",))) for columns in splits.values()]
    assert sum(map(len, hashes)) == len(set.union(*hashes))


def test_equal_pictures_with_other_labels_are_reported() -> None:
    train = {name: array.copy() for name, array in tiny_dataset().splits["train"].items()}
    train["image"][7] = train["image"][0]
    _, report = split_dataset(replace(tiny_dataset(), splits={"train": train}), PLAN)
    assert report["first_label_conflicts"] == [[0, 7]]


@pytest.mark.parametrize("victim", ["train.image.npy", "validation.label.npy", "MANIFEST.json"])
def test_a_flipped_byte_is_found_and_named_then_quarantine(tmp_path: Path, victim: str) -> None:
    snapshot = make(tmp_path)
    path = snapshot.path / victim
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptionError, match=rf"{victim}.*Materialize `snapshot`"):
        open_snapshot(snapshot.path)
    dataset = tiny_dataset()
    again, warnings = snapshot_of(Store(tmp_path), dataset.digest(), TinyWorkload(dataset))
    assert victim in warnings[0]
    assert again.digest == snapshot.digest
    assert (tmp_path / "snapshots" / f"{snapshot.digest}.corrupt-1" / victim).read_bytes() == content


def test_a_renamed_snapshot_is_refused(tmp_path: Path) -> None:
    snapshot = make(tmp_path)
    snapshot.path.rename(snapshot.path.with_name("0" * 64))
    with pytest.raises(CorruptionError, match="renamed"):
        open_snapshot(tmp_path / "snapshots" / ("0" * 64))


def test_a_changed_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="changed since"):
        snapshot_of(Store(tmp_path), "0" * 64, TinyWorkload(tiny_dataset()))


def _make_in_process(root: str) -> None:
    make(Path(root), tiny_dataset(rows=3000))


def test_partitions_that_write_one_snapshot_at_once_are_safe(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    writers = [context.Process(target=_make_in_process, args=(str(tmp_path),)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(300)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    folders = [p.name for p in (tmp_path / "snapshots").iterdir() if p.name != "requests"]
    assert len(folders) == 1
    open_snapshot(tmp_path / "snapshots" / folders[0])


def test_a_plan_that_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="brings no test split"):
        split_dataset(tiny_dataset(), SplitPlan(0.1))
    with pytest.raises(DataError, match="a split would be empty"):
        split_dataset(tiny_dataset(rows=1, classes=1), PLAN)


def test_digits_are_complete() -> None:
    dataset = DigitsSource().load()
    assert dataset.counts == {"train": 1797}
    assert dataset.splits["train"]["image"].shape == (1797, 1, 8, 8)
    assert dataset.splits["train"]["image"].max() == 16


def write_cifar(folder: Path, **changes: Any) -> Path:
    root = folder / "cifar-10-batches-py"
    root.mkdir(parents=True)
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        batch = {b"data": np.full((10, 3072), len(name), np.uint8), b"labels": list(range(10))}
        (root / name).write_bytes(pickle.dumps(batch | changes.get(name, {})))
    return folder


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code ran",))


def test_cifar10_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="mlpipes fetch cifar10"):
        Cifar10Source().load()
    monkeypatch.setenv("MLPIPES_CIFAR10", str(tmp_path))
    with pytest.raises(DataError, match=f"MLPIPES_CIFAR10={tmp_path} holds no"):
        Cifar10Source().load()


def test_cifar10_reads_the_standard_layout_and_refuses_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLPIPES_CIFAR10", str(write_cifar(tmp_path / "good")))
    dataset = Cifar10Source().load()
    assert dataset.counts == {"train": 50, "test": 10}
    assert "subset or modified" in dataset.provenance.fidelity
    bad = {
        "shape": ({"data_batch_2": {b"data": np.zeros((10, 9), np.uint8)}}, "data_batch_2 does not have the standard"),
        "label": ({"test_batch": {b"labels": [10] * 10}}, r"a label is outside 0\.\.9"),
        "code": ({"data_batch_3": {b"extra": Evil()}}, "data_batch_3 is not a readable batch"),
    }
    for name, (change, message) in bad.items():
        monkeypatch.setenv("MLPIPES_CIFAR10", str(write_cifar(tmp_path / name, **change)))
        with pytest.raises(DataError, match=message):
            Cifar10Source().load()
    assert "code ran" not in capsys.readouterr().out


def test_real_cifar10(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPIPES_CIFAR10", str(real_data / "cifar10"))
    dataset = Cifar10Source().load()
    assert dataset.counts == {"train": 5170, "test": 1017}
    assert dataset.facts["class_names"][0] == "airplane"
    assert "subset" in dataset.provenance.fidelity


def test_how_it_was_prepared_and_each_byte_of_its_files_count_in_the_digest(tmp_path: Path) -> None:
    """Two preparations that give equal columns here may give others elsewhere; a vocabulary is data like any column."""

    class WithFiles(TinyWorkload):
        def __init__(self, how: str, vocabulary: str) -> None:
            super().__init__(tiny_dataset())
            self.preparation, self.vocabulary = {"how": how}, vocabulary

        def prepare(self, splits: Any, facts: Any, scratch: Path) -> Prepared:
            (scratch / "words").write_text(self.vocabulary)
            return Prepared(splits, facts, {"words": scratch / "words"})

    def made(how: str, vocabulary: str) -> str:
        # In a store of its own each: the request would name another snapshot already.
        root = tmp_path / f"{how} {vocabulary}"
        return snapshot_of(Store(root), tiny_dataset().digest(), WithFiles(how, vocabulary))[0].digest

    assert len({made("once", "a b"), made("twice", "a b"), made("once", "a c")}) == 3
