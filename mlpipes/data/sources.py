"""Sources of images: scikit-learn's embedded digits, and CIFAR-10 in its standard folder layout."""

import hashlib
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlpipes.data.dataset import Dataset, Provenance
from mlpipes.errors import DataError
from mlpipes.store.layout import home

CIFAR10_VARIABLE = "MLPIPES_CIFAR10"
_CIFAR10_FOLDER = "cifar-10-batches-py"


@dataclass(frozen=True)
class DigitsSource:
    """1,797 handwritten digits, 8×8 pixels with values 0..16, embedded in scikit-learn; no network needed."""

    def load(self) -> Dataset:
        """One split `train` with `image` uint8 (N, 1, 8, 8) and `label` int64 (N,)."""
        from sklearn.datasets import load_digits

        bunch: Any = load_digits()
        return Dataset(
            splits={
                "train": {
                    "image": bunch.images.astype(np.uint8)[:, None],
                    "label": bunch.target.astype(np.int64),
                }
            },
            provenance=Provenance(
                name="Optical Recognition of Handwritten Digits (UCI, the copy in scikit-learn)",
                licence="CC BY 4.0",
                origin="Alpaydin and Kaynak 1998, doi:10.24432/C50P49, through sklearn.datasets.load_digits",
                fidelity="complete: the 1,797 images of the UCI test set; splits are made here",
            ),
            facts={"class_names": [str(digit) for digit in range(10)], "pixel_maximum": 16},
        )


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles nothing but NumPy arrays in plain containers, so that a data file cannot run code."""

    _ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
            *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),  # of protocol 5
            ("_codecs", "encode"),
            *((module, "bytes") for module in ("__builtin__", "builtins")),  # of an empty array
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a batch of images has no use for")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_batch(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            content = _ArrayUnpickler(stream, encoding="bytes").load()
        # Written by Python 2, the original's keys are bytes; copies made since then have text.
        return {_text(key): value for key, value in content.items()}
    except FileNotFoundError as error:
        raise DataError(
            f"CIFAR-10: {path} is missing; the folder must hold data_batch_1..5, test_batch, batches.meta"
        ) from error
    except Exception as error:
        raise DataError(f"CIFAR-10: {path} is not a readable batch: {error}") from error


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


@dataclass(frozen=True)
class Cifar10Source:
    """CIFAR-10 (Krizhevsky 2009) from a folder in the standard layout, whole or a subset.

    The folder is `$MLPIPES_CIFAR10` (it or its child `cifar-10-batches-py`), else `data/cifar10` in the home folder,
    where `mlpipes fetch cifar10` puts it. What is there is used as it is, and its fidelity is recorded.
    """

    def folder(self) -> Path:
        """The folder with the batches. Raises DataError saying how to get them."""
        configured = os.environ.get(CIFAR10_VARIABLE)
        root = Path(configured).expanduser() if configured else home() / "data" / "cifar10"
        for candidate in (root / _CIFAR10_FOLDER, root):
            if (candidate / "batches.meta").is_file():
                return candidate
        place = f"{CIFAR10_VARIABLE}={configured} holds" if configured else f"{root} holds"
        raise DataError(
            f"CIFAR-10 is not there: {place} no {_CIFAR10_FOLDER}/batches.meta. Run `mlpipes fetch cifar10` (170 MB, needs "
            f"the network), or set {CIFAR10_VARIABLE} to a folder that has the standard layout."
        )

    def load(self) -> Dataset:
        """Splits `train` and `test` with `image` uint8 (N, 3, 32, 32) and `label` int64 (N,)."""
        folder = self.folder()
        names = [_text(name) for name in _read_batch(folder / "batches.meta").get("label_names", [])]
        if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise DataError(
                f"CIFAR-10: {folder / 'batches.meta'} has no label_names that are texts, each once; it is not the standard "
                "file"
            )
        splits = {
            "train": _stack(folder, [f"data_batch_{number}" for number in range(1, 6)], len(names)),
            "test": _stack(folder, ["test_batch"], len(names)),
        }
        counts = {split: len(columns["label"]) for split, columns in splits.items()}
        fidelity = (
            "complete, original bytes"
            if _is_original(folder)
            else "subset or modified: md5 sums differ from the archive's"
        )
        return Dataset(
            splits=splits,
            provenance=Provenance(
                name="CIFAR-10",
                licence="none stated by its authors",
                origin="Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images",
                fidelity=f"{fidelity} ({counts['train']:,} training and {counts['test']:,} test images)",
            ),
            facts={"class_names": names, "pixel_maximum": 255},
        )


def _stack(folder: Path, batches: list[str], classes: int) -> dict[str, np.ndarray]:
    images, labels = [], []
    for name in batches:
        batch = _read_batch(folder / name)
        try:
            pixels, targets = np.asarray(batch["data"]), np.asarray(batch["labels"])
            if len(targets) and targets.dtype.kind not in "iu":
                raise ValueError(f"labels are {targets.dtype}, expected whole numbers")
            if targets.ndim != 1:
                raise ValueError(f"labels are of shape {targets.shape}, expected one number for each image")
            targets = targets.astype(np.int64)
            if pixels.dtype != np.uint8 or pixels.shape != (len(targets), 3072):
                raise ValueError(f"data is {pixels.dtype}{pixels.shape}, expected uint8({len(targets)}, 3072)")
            if len(targets) and not (targets.min() >= 0 and targets.max() < classes):
                raise ValueError(f"a label is outside 0..{classes - 1}")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"CIFAR-10: {folder / name} does not have the standard layout: {error}") from error
        images.append(pixels.reshape(-1, 3, 32, 32))
        labels.append(targets)
    if not sum(map(len, labels)):
        raise DataError(
            f"CIFAR-10: {', '.join(batches)} in {folder} hold no image; at least one is needed in each split"
        )
    return {"image": np.concatenate(images), "label": np.concatenate(labels)}


def _is_original(folder: Path) -> bool:
    from torchvision.datasets import CIFAR10

    return all(
        hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest() == expected
        for name, expected in [*CIFAR10.train_list, *CIFAR10.test_list]
    )


def fetch_cifar10() -> Path:
    """Download CIFAR-10 with torchvision (which checks its md5 sum) into the home folder; returns the folder.

    Raises DataError if it cannot be fetched.
    """
    from torchvision.datasets import CIFAR10

    root = home() / "data" / "cifar10"
    root.mkdir(parents=True, exist_ok=True)
    try:
        CIFAR10(str(root), download=True)
    except Exception as error:
        raise DataError(
            f"CIFAR-10 could not be downloaded ({error}). Put the unpacked folder {_CIFAR10_FOLDER} anywhere and set "
            f"{CIFAR10_VARIABLE} to it."
        ) from error
    return root / _CIFAR10_FOLDER
