"""Folders of JPEG and PNG files, one folder a class: decoded once into memory-mapped arrays in the home's cache."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from filelock import FileLock

from mlpipes.data.class_folders import find_images, listed, shown
from mlpipes.data.dataset import Dataset, Provenance
from mlpipes.data.image_file import UNREAD, Decoder, decoder_versions
from mlpipes.errors import ConfigError, CorruptionError, DataError
from mlpipes.store.files import digest_of, open_published, publishing, quarantine, sha256_file
from mlpipes.store.layout import home

KIND = "image-folder"
VERSION = 1
"""Of the cache; to be raised whenever `Decoder` gives other pixels."""
_FILE = "images.npy"
_BLOCK = 32
"""Files that a thread takes at a time."""

R = TypeVar("R")


@dataclass(frozen=True)
class ImageFolder:
    """Images in `root/<class>/…`, or in `root/train/<class>/…` and `root/test/<class>/…`, at any depth below the class.

    Read are JPEG, PNG, WebP, BMP and still GIF. They are turned as their EXIF orientation says, transparency is laid on
    the background, CMYK becomes RGB, 16 bits become the upper 8. Classes are numbered, and files ordered, by the bytes of
    their names. Hidden files are passed over, and other files that are no images, which the provenance counts; any image
    that cannot be read is an error.
    """

    root: str | Path
    """The folder; `~` and environment variables in it are expanded, so that `"$FLOWERS"` is one that each machine sets."""
    size: int | tuple[int, int]
    """Height and width in pixels, or the side of a square."""
    colour: Literal["rgb", "grey"] = "rgb"
    fit: Literal["cover", "contain", "stretch"] = "cover"
    """Of another shape than `size`: cut off what is over, fill up with background, or distort."""
    background: int = 255
    """The brightness behind what is transparent, and beside what `contain` does not fill: 0 (black) to 255 (white)."""
    train_folders: Sequence[str] | None = None
    """Folders of `root` to train on. None: `train` if it is there, else the folders of `root` are the classes, which `()`
    says whatever they are called."""
    test_folder: str | None = None
    """The folder of `root` to test on. None: `test`, if it is there and the classes lie in training folders."""
    ignored_folders: Sequence[str] = ()
    """Folders of `root` to leave alone, such as one of images without labels."""
    name: str = ""
    licence: str = "not stated"
    origin: str = "local files"

    def __post_init__(self) -> None:
        for field in ("train_folders", "ignored_folders"):
            if isinstance(value := getattr(self, field), str):
                raise ConfigError(f"{field}: expected a tuple of names, such as ({value!r},)")
        _ = self.decoder  # raises ConfigError for what it cannot do

    @property
    def decoder(self) -> Decoder:
        """What turns a file's bytes into an image as this source has them."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return Decoder(height, width, self.colour, self.fit, self.background)

    @property
    def folder(self) -> Path:
        """The root as it is on this machine. Raises DataError if it is no folder."""
        return folder_here(self.root)

    def load(self) -> Dataset:
        """Splits `train`, and `test` if there is such a folder: `image` uint8 (N, C, H, W), `label` int64 (N,).

        The images are memory-mapped. Raises DataError naming the files or folders that are not as they must be.
        """
        root = self.folder
        found = find_images(root, self.train_folders, self.test_folder, self.ignored_folders)
        names, passed = found.names, found.passed
        paths = [path for classes in found.splits.values() for name in names for path in classes.get(name, ())]
        images, end, splits = decoded_files(root, paths, self.decoder), 0, {}
        for split, classes in found.splits.items():
            counts = [len(classes.get(name, ())) for name in names]
            begin, end = end, end + sum(counts)
            splits[split] = {"image": images[begin:end], "label": np.repeat(np.arange(len(names)), counts)}
        decoder = self.decoder
        return Dataset(
            splits=splits,
            provenance=Provenance(
                name=self.name or root.name,
                licence=self.licence,
                origin=self.origin,
                fidelity=f"as found; {decoder.colour}, {decoder.fit} {decoder.height}×{decoder.width} pixels, decoded by "
                f"Pillow {decoder_versions()['pil']}",
                notes=f"passed over, being no images: {listed(root, passed)}" if passed else "",
            ),
            facts={"class_names": names, "pixel_maximum": 255},
        )


def folder_here(root: str | Path) -> Path:
    """A folder as it is on this machine, `~` and environment variables expanded. Raises DataError if it is none."""
    path = Path(os.path.expandvars(root)).expanduser().absolute()
    if not path.is_dir():
        variable = " Is the environment variable set?" if "$" in str(path) else ""
        raise DataError(f"there is no folder {shown(path)} to read images from.{variable}")
    return path


class Decoding(Protocol):
    """What turns a file's bytes into an array uint8 of `shape`; its `repr` says all that the pixels depend on."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of every array."""
        ...

    def __call__(self, content: bytes) -> np.ndarray:
        """The array. Raises ValueError saying what is wrong with the file."""
        ...


def decoded_files(root: Path, paths: Sequence[Path], decoder: Decoding) -> np.ndarray:
    """The decoded files, uint8 (N, …), memory-mapped from the cache; decoded now if they are not there.

    Raises DataError naming those that cannot be used, relative to the root.
    """
    digests = _each(root, paths, lambda row: _digest(paths[row]), "reading")
    key = digest_of({"version": VERSION, "decoder": repr(decoder), "with": decoder_versions(), "files": digests})
    cache = home() / "cache" / KIND
    cache.mkdir(parents=True, exist_ok=True)
    # One process decodes, and those that want the same wait for it; one that dies lets go of the lock.
    with FileLock(str(cache / f"{key}.lock")):
        if not _is_there(cache / key):
            for leftover in cache.glob(f".tmp-{key}-*"):
                shutil.rmtree(leftover)
            with publishing(cache / key, kind=KIND, version=VERSION) as draft:
                images = _empty(draft.path / _FILE, (len(paths), *decoder.shape))

                def decode(row: int) -> None:
                    content = paths[row].read_bytes()
                    if hashlib.sha256(content).hexdigest() != digests[row]:
                        raise ValueError("it changed while the folder was read")
                    images[row] = decoder(content)

                _each(root, paths, decode, "decoding")
                images.flush()
    return np.load(cache / key / _FILE, mmap_mode="r", allow_pickle=False)


def _is_there(path: Path) -> bool:
    """Whether the cache has it; what is corrupt is quarantined."""
    try:
        open_published(path, kind=KIND, versions=frozenset({VERSION}))
    except FileNotFoundError:
        return False
    except CorruptionError:
        quarantine(path)
        return False
    return True


def _digest(path: Path) -> str:
    if path.suffix.lower() in UNREAD:
        raise ValueError(f"{path.suffix} is not read here: convert it to JPEG or PNG")
    if not path.is_file():
        raise ValueError("it is a link to nothing, or no regular file")
    return sha256_file(path)


def _empty(path: Path, shape: tuple[int, ...]) -> np.memmap:
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    with path.open("r+b") as stream:
        # Where the disk is full, this is an error; writing to memory that has no disk behind it kills the process.
        os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
    return images


def _each(root: Path, paths: Sequence[Path], work: Callable[[int], R], what: str) -> list[R]:
    """What `work` gives for the number of each path, in order; a bar shows the progress of long work.

    Raises DataError listing the paths for which it raises OSError or ValueError.
    """
    from joblib import cpu_count  # which knows the limits of containers
    from tqdm import tqdm

    def of_block(numbers: Iterable[int]) -> list[tuple[R | None, str]]:
        return [attempt(number) for number in numbers]

    def attempt(number: int) -> tuple[R | None, str]:
        try:
            return work(number), ""
        except (OSError, ValueError) as error:
            return None, (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__

    blocks = [range(start, min(start + _BLOCK, len(paths))) for start in range(0, len(paths), _BLOCK)]
    results: list[Any] = []
    bad: dict[Path, str] = {}
    with (
        ThreadPoolExecutor(cpu_count()) as pool,
        tqdm(total=len(paths), desc=f"{what} {root.name}", unit=" images", delay=5, mininterval=5) as bar,
    ):
        # An error or an interruption drops `map`, which cancels what has not begun.
        for block, done in zip(blocks, pool.map(of_block, blocks), strict=True):
            results += [result for result, _ in done]
            bad |= {paths[number]: reason for number, (_, reason) in zip(block, done, strict=True) if reason}
            bar.update(len(block))
    if bad:
        raise DataError(
            f"{shown(root)}: {len(bad):,} of {len(paths):,} images cannot be used: {listed(root, bad, bad)}"
        )
    return results
