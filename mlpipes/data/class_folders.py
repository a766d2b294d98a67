"""Images that lie in one folder a class: which file belongs to which split and class, and what is passed over."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlpipes.data.image_file import EXTENSIONS, UNREAD
from mlpipes.errors import DataError

_LITTER = frozenset({"thumbs.db", "desktop.ini", "__macosx", "@eadir"})
_SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"})
_SHOWN = 10


@dataclass(frozen=True)
class ClassFolders:
    """The images of a folder, sorted out."""

    names: list[str]
    """Of the classes, in the order of their bytes."""
    splits: dict[str, dict[str, list[Path]]]
    """The images of each split and class: in the order of the training folders and, within one, of their paths' bytes."""
    passed: set[Path]
    """Files that are no images, as far as their extensions say."""


def find_images(root: Path, train: Sequence[str] | None, test: str | None, ignored: Sequence[str] = ()) -> ClassFolders:
    """The images of a folder; `ImageFolder` says what `train`, `test` and `ignored`, names of folders in it, mean.

    Raises DataError naming the folders or files that are not where they must be.
    """
    passed: set[Path] = set()
    there = {folder.name: folder for folder in _subfolders(root, passed) if folder.name not in ignored}
    classes_at_root = train is not None and not train
    if train is None:
        train = ("train",) if "train" in there else ()
    if test is None and train and "test" in there and "test" not in train:
        test = "test"
    if missing := [name for name in (*train, test) if name is not None and name not in there]:
        raise DataError(f"{shown(root)} has no folder {missing[0]!r}; it has {', '.join(map(repr, there)) or 'none'}")
    if train:
        _assert_all_named(there, train, test, passed)
        parents = {"train": [there[name] for name in train]} | ({"test": [there[test]]} if test else {})
        classes = {
            split: [c for folder in found for c in _subfolders(folder, passed)] for split, found in parents.items()
        }
    elif test:
        raise DataError(f"test_folder={test!r} needs train_folders=(…,), the folders to train on beside it")
    elif not classes_at_root and (suspects := [name for name in there if name.lower() in _SPLITS]):
        raise DataError(
            f"{shown(root)} has no folder 'train', but {', '.join(map(repr, suspects))}, which look like splits. "
            "Say train_folders=(…,) and test_folder=…; or train_folders=() if they are classes."
        )
    else:
        classes = {"train": list(there.values())}
    splits = {split: _images(root, folders, passed) for split, folders in classes.items()}
    return ClassFolders(_class_names(root, splits), splits, passed)


def images_below(root: Path) -> tuple[list[Path], set[Path]]:
    """The images at any depth below a folder in the order of their paths' bytes, and the files that are none.

    Raises DataError if there is no image, or a name is no text.
    """
    passed: set[Path] = set()
    found = sorted(_walk(root, passed), key=os.fsencode)
    if odd := [path for path in found if not _is_text(path.relative_to(root))]:
        raise DataError(f"{shown(odd[0])}: its name is not in UTF-8, so no result can say it; rename it")
    if not found:
        raise DataError(
            f"{shown(root)} has no image; files are known by their extensions: {', '.join(sorted(EXTENSIONS))}"
        )
    return found, passed


def _is_text(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:  # bytes that Python shows as halves of characters
        return False
    return True


def _assert_all_named(there: Mapping[str, Path], train: Sequence[str], test: str | None, passed: set[Path]) -> None:
    """Raises DataError for images that are in no split."""
    for name, folder in there.items():
        if name not in train and name != test and (images := list(_walk(folder, passed))):
            raise DataError(
                f"{shown(folder)} has images ({len(images):,}) that are in no split; the validation split is taken from "
                f"training (SplitPlan). Say train_folders={(*train, name)!r} to have them there, test_folder={name!r} to "
                f"test on them, or ignored_folders=({name!r},); or, if {train[0]!r} is a class, train_folders=()."
            )


def shown(path: Path) -> str:
    """A path in an error: quoted, so that odd characters in it are seen."""
    return repr(str(path))


def listed(root: Path, paths: Collection[Path], reasons: Mapping[Path, str] | None = None) -> str:
    """The first paths, relative to the root, and how many there are."""
    first = sorted(paths, key=os.fsencode)[:_SHOWN]
    texts = [f"{path.relative_to(root).as_posix()!r}" + (f" ({reasons[path]})" if reasons else "") for path in first]
    return ", ".join(texts) + (f", and {len(paths) - _SHOWN:,} more" if len(paths) > _SHOWN else "")


def _entries(folder: Path) -> list[Path]:
    """What is in a folder in the order of names, less what is hidden and what systems put there."""
    try:
        found = [path for path in folder.iterdir() if path.name[0] != "." and path.name.lower() not in _LITTER]
    except OSError as error:
        raise DataError(f"the folder {shown(folder)} cannot be read: {error.strerror}") from error
    return sorted(found, key=os.fsencode)


def _walk(path: Path, passed: set[Path], above: tuple[str, ...] = ()) -> Iterator[Path]:
    """The images at or below a path; links are followed. Other files are added to `passed`."""
    if path.is_dir():
        real = os.path.realpath(path)
        if real in above:
            raise DataError(f"{shown(path)} is a link to a folder that it lies in")
        for entry in _entries(path):
            yield from _walk(entry, passed, (*above, real))
    elif path.suffix.lower() in EXTENSIONS | UNREAD:
        yield path
    else:
        passed.add(path)


def _subfolders(folder: Path, passed: set[Path]) -> list[Path]:
    """The folders in a folder, which may hold no images itself."""
    entries = _entries(folder)
    if stray := [image for path in entries if not path.is_dir() for image in _walk(path, passed)]:
        raise DataError(f"{shown(folder)} has images that are in no folder of a class: {listed(folder, stray)}")
    return [path for path in entries if path.is_dir()]


def _images(root: Path, classes: Sequence[Path], passed: set[Path]) -> dict[str, list[Path]]:
    """The images in the folders of classes, of which several may have the same name."""
    found: dict[str, list[Path]] = {}
    empty = []
    for folder in classes:
        images = sorted(_walk(folder, passed), key=os.fsencode)
        found.setdefault(folder.name, []).extend(images)
        if not images:
            empty.append(folder)
    if empty:
        raise DataError(f"{shown(root)} has folders of classes without an image: {listed(root, empty)}")
    return found


def _class_names(root: Path, found: dict[str, dict[str, list[Path]]]) -> list[str]:
    names = sorted(found["train"], key=os.fsencode)
    if len(names) < 2:
        raise DataError(
            f"{shown(root)} has {f'only the class {names[0]!r}' if names else 'no class'}, so there is nothing to tell "
            "apart. Each class needs a folder of its own, right below the root or below `train` and `test`."
        )
    if unknown := sorted(found.get("test", {}).keys() - set(names), key=os.fsencode):
        raise DataError(f"{shown(root)}: only the test split has the classes {', '.join(map(repr, unknown))}")
    for name in names:
        if name != name.encode(errors="replace").decode():
            raise DataError(f"{shown(root)}: the name of the class {name!r} is not UTF-8")
    return names
