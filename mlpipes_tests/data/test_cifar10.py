"""CIFAR-10's folder: batches of any pickle protocol and label type, and one clear error for what is none."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpipes.data.sources import Cifar10Source
from mlpipes.errors import DataError

NAMES = ["airplane", "automobile", "bird"]
LABELS = [0, 1, 2, 1]
IMAGES = np.arange(4 * 3072, dtype=np.int64).astype(np.uint8).reshape(4, 3072)


def folder(path: Path, labels: Any = LABELS, data: Any = IMAGES, protocol: int = 4) -> Path:
    """The standard layout, with the same rows in each batch."""
    inner = path / "cifar-10-batches-py"
    inner.mkdir(parents=True)
    (inner / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES}, protocol))
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (inner / name).write_bytes(pickle.dumps({"data": data, "labels": labels}, protocol))
    return path


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "labels",
    [
        LABELS,
        [np.int64(label) for label in LABELS],
        [np.uint8(label) for label in LABELS],
        np.array(LABELS),
        tuple(LABELS),
    ],
    ids=["int", "np.int64", "np.uint8", "array", "tuple"],
)
def test_whole_numbers_of_any_kind_and_protocol_load(
    protocol: int, labels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLPIPES_CIFAR10", str(folder(tmp_path, labels, protocol=protocol)))
    loaded = Cifar10Source().load()
    assert loaded.splits["train"]["label"].tolist() == LABELS * 5
    assert loaded.splits["test"]["label"].dtype == np.int64
    assert np.array_equal(loaded.splits["test"]["image"].reshape(4, 3072), IMAGES)


@pytest.mark.parametrize(
    ("labels", "data", "said"),
    [
        ([0.0, 1.0, 2.0, 1.0], IMAGES, "labels are float64, expected whole numbers"),
        ([0.9, 1.5, 2.0, 1.0], IMAGES, "labels are float64"),
        ([True, False, True, True], IMAGES, "labels are bool"),
        (["0", "1", "2", "1"], IMAGES, "labels are"),
        ([0, 1, None, 1], IMAGES, "labels are object"),
        ([0, 1, 3, 1], IMAGES, "outside 0..2"),
        ([], IMAGES[:0], "hold no image"),
        (np.array(LABELS)[:, None], IMAGES, r"labels are of shape \(4, 1\)"),
        (np.eye(4, dtype=np.int64), IMAGES, r"labels are of shape \(4, 4\)"),
        (LABELS[:3], IMAGES, "expected uint8"),
        (LABELS, IMAGES.astype(np.float32), "expected uint8"),
    ],
)
def test_what_is_no_batch_is_refused(
    labels: Any, data: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLPIPES_CIFAR10", str(folder(tmp_path, labels, data)))
    with pytest.raises(DataError, match=said):
        Cifar10Source().load()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_batches_of_a_subset_may_be_empty(protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path, protocol=protocol)
    for name in ("data_batch_2", "data_batch_4"):
        empty = pickle.dumps({"data": IMAGES[:0], "labels": []}, protocol)
        (path / "cifar-10-batches-py" / name).write_bytes(empty)
    monkeypatch.setenv("MLPIPES_CIFAR10", str(path))
    assert Cifar10Source().load().splits["train"]["label"].tolist() == LABELS * 3


@pytest.mark.parametrize("names", [["a", "a", "b"], [0, 1, 2], [], [b"\xff", b"\xfe", b"c"]])
def test_names_of_classes_are_texts_each_once(names: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path)
    (path / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setenv("MLPIPES_CIFAR10", str(path))
    with pytest.raises(DataError, match="has no label_names that are texts, each once"):
        Cifar10Source().load()


def test_a_batch_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path)
    (path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(Path))
    monkeypatch.setenv("MLPIPES_CIFAR10", str(path))
    with pytest.raises(DataError, match="has no use for"):
        Cifar10Source().load()
