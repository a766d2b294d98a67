"""Sources of photographs for super-resolution, as square patches: those that libraries bundle, or a folder of one's own."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlpipes.data.class_folders import images_below, listed
from mlpipes.data.dataset import Dataset, Provenance
from mlpipes.data.image_file import decoder_versions, whole_picture
from mlpipes.data.image_folder import decoded_files, folder_here
from mlpipes.errors import ConfigError, DataError

PATCH = 144
"""Sides of patches: a multiple of all scales, and larger than what a training step cuts out of one."""
_CELL, _SPACING, _LEAST = 208, 48, 32

BUNDLED: Mapping[str, str] = {
    "astronaut": "public domain (NASA)",
    "brick": "CC0",
    "camera": "CC0",
    "chelsea": "CC0",
    "coffee": "CC0",
    "grass": "CC0",
    "gravel": "CC0",
    "rocket": "CC0",
    "stereo_motorcycle": "Middlebury Stereo 2014, no licence stated",
}
"""Functions of `skimage.data` whose photographs are in scikit-image's wheel, and what they are licensed under."""


@dataclass(frozen=True)
class Photographs:
    """The photographs that scikit-learn and scikit-image bundle.

    Training has patches of the left and right two fifths of each, cut from cells that share no pixel: a split by `region`
    leaks none. The test split is the fifth in the middle of each, whole, or the photographs of `test_folder`.
    """

    test_folder: str | Path | None = None
    """A folder of photographs to test on instead; `~` and environment variables in it are expanded."""

    def load(self) -> Dataset:
        """Splits of columns `image` uint8 (N, 3, H, W), `size` (N, 2), `photograph` (N,), and `region` in training."""
        train: dict[str, list[Any]] = {"image": [], "photograph": [], "region": []}
        strips: dict[str, np.ndarray] = {}
        region = 0
        for number, (name, picture) in enumerate(bundled_photographs()):
            width = picture.shape[1]
            strips[name] = picture[:, width * 2 // 5 : width * 3 // 5]
            for side in (picture[:, : width * 2 // 5], picture[:, width * 3 // 5 :]):
                for cell in _cells(side):
                    for patch in patches(cell):
                        for column, value in zip(train, (patch, number, region), strict=True):
                            train[column].append(value)
                    region += 1
        columns = {name: np.stack(values) for name, values in train.items()}
        names = list(strips)
        held_out = strips if self.test_folder is None else pictures_in(folder_here(self.test_folder))
        where = "the fifth in the middle of each" if self.test_folder is None else "a folder's photographs"
        return Dataset(
            splits={
                "train": columns | {"size": _sizes(columns["image"])},
                "test": whole_pictures(held_out, len(names) if self.test_folder else 0),
            },
            provenance=Provenance(
                name="Photographs that scikit-learn and scikit-image bundle",
                licence="; ".join(["CC BY 2.0 (china, flower)", *(f"{lic} ({name})" for name, lic in BUNDLED.items())]),
                origin="sklearn.datasets.load_sample_images, skimage.data",
                fidelity=f"real photographs, some of them grey or decoded from JPEG; tested on {where}. Low-resolution "
                "frames are made of them (bicubic), and so is any motion: synthetic",
            ),
            facts={"photographs": names + (list(held_out) if self.test_folder else []), "pixel_maximum": 255},
        )


@dataclass(frozen=True)
class PhotographFolder:
    """A folder of photographs at any depth: JPEG, PNG, WebP, BMP. Split them by `photograph`, so that none is in two splits.

    Each is decoded once, into `per_side` × `per_side` patches, evenly spread, in the home's cache.
    """

    root: str | Path
    """The folder; `~` and environment variables in it are expanded."""
    test_folder: str | Path | None = None
    """A folder of photographs to test on, whole; None: patches of `root` that the split plan sets aside."""
    per_side: int = 4
    name: str = ""
    licence: str = "not stated"
    origin: str = "local files"

    def __post_init__(self) -> None:
        if not (isinstance(self.per_side, int) and 1 <= self.per_side <= 32):
            raise ConfigError(
                f"per_side {self.per_side!r}: expected from 1 to 32 patches along each side of a photograph"
            )

    def load(self) -> Dataset:
        """Splits of columns as `Photographs` has them; `region` is the photograph. Raises DataError for unreadable files."""
        root = folder_here(self.root)
        paths, passed = images_below(root)
        found = decoded_files(root, paths, _Cutter(self.per_side))
        images = found.reshape(-1, *found.shape[2:])
        photograph = np.repeat(np.arange(len(paths)), found.shape[1])
        train = {"image": images, "photograph": photograph, "region": photograph, "size": _sizes(images)}
        names, splits = [path.relative_to(root).as_posix() for path in paths], {"train": train}
        if self.test_folder is not None:
            pictures = pictures_in(folder_here(self.test_folder))
            splits["test"] = whole_pictures(pictures, len(names))
            names += list(pictures)
        return Dataset(
            splits=splits,
            provenance=Provenance(
                name=self.name or root.name,
                licence=self.licence,
                origin=self.origin,
                fidelity=f"as found, decoded by Pillow {decoder_versions()['pil']}; {found.shape[1]} patches of "
                f"{PATCH}×{PATCH} pixels of each photograph. Low-resolution frames are made of them (bicubic), and so is "
                "any motion: synthetic",
                notes=f"passed over, being no images: {listed(root, passed)}" if passed else "",
            ),
            facts={"photographs": names, "pixel_maximum": 255},
        )


def bundled_photographs() -> Iterator[tuple[str, np.ndarray]]:
    """Names and pixels uint8 (H, W, 3) of what the installed libraries bundle; nothing is downloaded."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    samples: Any = load_sample_images()
    for path, picture in zip(samples.filenames, samples.images, strict=True):
        yield Path(path).stem, np.asarray(picture)
    for name in BUNDLED:
        found: Any = getattr(skimage.data, name)()
        picture = found[0] if isinstance(found, tuple) else found  # the left one of a stereo pair
        yield name, np.repeat(picture[..., None], 3, axis=2) if picture.ndim == 2 else picture[..., :3]


def pictures_in(root: Path) -> dict[str, np.ndarray]:
    """The photographs of a folder by name, uint8 (H, W, 3). Raises DataError for the first that cannot be read."""
    paths, _ = images_below(root)
    pictures = {}
    for path in paths:
        try:
            pictures[path.relative_to(root).as_posix()] = whole_picture(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: {error}") from error
    return pictures


def patches(picture: np.ndarray, rows: int | None = None, columns: int | None = None) -> list[np.ndarray]:
    """Patches uint8 (3, PATCH, PATCH) of a picture (H, W, 3), evenly spread; by default, so that they overlap well."""

    def starts(length: int, count: int | None) -> list[int]:
        many = count or 1 + -(-(length - PATCH) // _SPACING)
        return np.linspace(0, length - PATCH, many).round().astype(int).tolist()

    return [
        picture[top : top + PATCH, left : left + PATCH].transpose(2, 0, 1)
        for top in starts(picture.shape[0], rows)
        for left in starts(picture.shape[1], columns)
    ]


@dataclass(frozen=True)
class _Cutter:
    """Patches of a file's photograph: what `decoded_files` keeps of each."""

    per_side: int
    side: int = PATCH

    @property
    def shape(self) -> tuple[int, ...]:
        return self.per_side**2, 3, self.side, self.side

    def __call__(self, content: bytes) -> np.ndarray:
        picture = whole_picture(content)
        if min(picture.shape[:2]) < self.side:
            raise ValueError(
                f"{picture.shape[1]}×{picture.shape[0]} pixels: less than a patch of {self.side}×{self.side}"
            )
        return np.stack(patches(picture, self.per_side, self.per_side))


def _cells(picture: np.ndarray) -> Iterator[np.ndarray]:
    """A picture cut into cells of about the same size, each large enough for patches."""
    rows, columns = (max(1, side // _CELL) for side in picture.shape[:2])
    for band in np.array_split(picture, rows, axis=0):
        yield from np.array_split(band, columns, axis=1)


def _sizes(images: np.ndarray) -> np.ndarray:
    return np.tile(np.array(images.shape[2:], dtype=np.int64), (len(images), 1))


def whole_pictures(pictures: Mapping[str, np.ndarray], first: int) -> dict[str, np.ndarray]:
    """Whole pictures of any sizes: each lies at the upper left of what holds the largest; `size` says how far it goes.

    `first` is the number of the first. Raises DataError for one that is too small to be judged.
    """
    if small := [name for name, picture in pictures.items() if min(picture.shape[:2]) < _LEAST]:
        raise DataError(
            f"photographs to test on must have {_LEAST} pixels a side at least, but not so {', '.join(small)}"
        )
    sizes = np.array([picture.shape[:2] for picture in pictures.values()], dtype=np.int64)
    images = np.zeros((len(pictures), 3, *sizes.max(axis=0)), dtype=np.uint8)
    for image, picture in zip(images, pictures.values(), strict=True):
        image[:, : picture.shape[0], : picture.shape[1]] = picture.transpose(2, 0, 1)
    numbers = np.arange(first, first + len(pictures))
    return {"image": images, "size": sizes, "photograph": numbers, "region": -1 - np.arange(len(pictures))}


def names_of(numbers: Sequence[int], facts: Mapping[str, Any]) -> list[str]:
    """The names of photographs by their numbers."""
    return [facts["photographs"][number] for number in numbers]
