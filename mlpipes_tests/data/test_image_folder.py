"""Folders of images: layouts, order, what is passed over, what is an error, and the cache of decoded images."""

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlpipes.data import image_folder
from mlpipes.data.image_file import Decoder
from mlpipes.data.image_folder import ImageFolder
from mlpipes.data.snapshot import snapshot_of
from mlpipes.data.splits import SplitPlan
from mlpipes.errors import ConfigError, DataError
from mlpipes.store.layout import Store


def write(path: Path, grey: int, **options: Any) -> Path:
    """A PNG or JPEG of one brightness, which JPEG keeps exactly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        Image.new("L", (8, 8), grey).save(stream, "JPEG" if path.suffix.lower().startswith(".j") else "PNG", **options)
    return path


def two_classes(root: Path) -> Path:
    """Classes a and b with the brightnesses 1, 2 and 101, 102."""
    for number in (1, 2):
        write(root / "a" / f"{number}.jpg", number)
        write(root / "b" / f"{number}.png", 100 + number)
    return root


def seen(folder: ImageFolder, split: str = "train") -> list[tuple[int, str]]:
    """Brightness and class of each image, in order."""
    dataset = folder.load()
    columns, names = dataset.splits[split], dataset.facts["class_names"]
    assert columns["image"].dtype == np.uint8
    assert columns["label"].dtype == np.int64
    return [
        (int(image[0, 0, 0]), names[label]) for image, label in zip(columns["image"], columns["label"], strict=True)
    ]


def grey(root: str | Path, **options: Any) -> ImageFolder:
    return ImageFolder(root, 4, colour="grey", **options)


def problem(root: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        grey(root, **options).load()
    return str(caught.value)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of its own, beside the home."""
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


# -- layouts ----------------------------------------------------------------------------------------------------------
def test_one_folder_a_class(root: Path) -> None:
    dataset = ImageFolder(two_classes(root / "pets"), (6, 4)).load()
    assert dataset.counts == {"train": 4}
    assert dataset.splits["train"]["image"].shape == (4, 3, 6, 4)
    assert dataset.facts == {"class_names": ["a", "b"], "pixel_maximum": 255}
    assert dataset.provenance.name == "pets"
    assert "cover 6×4" in dataset.provenance.fidelity
    assert seen(grey(root / "pets")) == [(1, "a"), (2, "a"), (101, "b"), (102, "b")]


def test_training_and_test_folders(root: Path) -> None:
    two_classes(root / "train")
    write(root / "test" / "b" / "x.png", 7)
    assert seen(grey(root)) == [(1, "a"), (2, "a"), (101, "b"), (102, "b")]
    assert seen(grey(root), "test") == [(7, "b")]
    two_classes(root / "only" / "train")
    assert grey(root / "only").load().counts == {"train": 4}


def test_images_in_no_split_are_an_error_until_it_is_said_what_they_are(root: Path) -> None:
    two_classes(root / "train")
    write(root / "val" / "a" / "v.png", 50)
    write(root / "test" / "a" / "t.png", 60)
    said = problem(root)
    assert "val' has images (1) that are in no split" in said
    assert "train_folders=('train', 'val')" in said
    both = grey(root, train_folders=("train", "val"))
    assert seen(both) == [(1, "a"), (2, "a"), (50, "a"), (101, "b"), (102, "b")]
    assert seen(both, "test") == [(60, "a")]
    assert "test' has images (1) that are in no split" in problem(root, test_folder="val")
    other = grey(root, test_folder="val", ignored_folders=("test",))
    assert (len(seen(other)), seen(other, "test")) == (4, [(50, "a")])
    (root / "notes").mkdir()
    (root / "notes" / "labels.csv").write_text("a,b")
    assert "'notes/labels.csv'" in both.load().provenance.notes


def test_folders_that_look_like_splits_are_not_taken_for_classes(root: Path) -> None:
    two_classes(root / "Training")
    two_classes(root / "Testing")
    assert "'Testing', 'Training', which look like splits" in problem(root)
    named = grey(root, train_folders=("Training",), test_folder="Testing")
    assert len(seen(named)) == len(seen(named, "test")) == 4
    assert "has no folder 'Trainin'; it has 'Testing', 'Training'" in problem(root, train_folders=("Trainin",))
    assert "needs train_folders" in problem(root, test_folder="Testing")
    with pytest.raises(ConfigError, match=r"train_folders: expected a tuple.*\('Training',\)"):
        grey(root, train_folders="Training")


def test_a_class_may_be_called_train(root: Path) -> None:
    write(root / "train" / "t.png", 1)
    write(root / "plane" / "p.png", 2)
    assert "if 'train' is a class, train_folders=()" in problem(root, ignored_folders=())
    assert seen(grey(root, train_folders=())) == [(2, "plane"), (1, "train")]


def test_the_root_may_be_named_by_an_environment_variable(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_classes(root / "pets")
    monkeypatch.setenv("PETS", str(root))
    assert len(seen(grey("$PETS/pets"))) == 4
    monkeypatch.delenv("PETS")
    with pytest.raises(DataError, match=r"no folder .*\$PETS/pets.*Is the environment variable set\?"):
        grey("$PETS/pets").load()
    with pytest.raises(DataError, match=r"there is no folder '/nowhere' to read images from\.$"):
        grey("/nowhere").load()


# -- names and order --------------------------------------------------------------------------------------------------
def test_the_order_is_that_of_the_names_bytes_at_any_depth(root: Path) -> None:
    for number, name in enumerate(["Z.png", "a.png", "b/deep/er/x.jpg", "b/y.JPEG", "é ü.PNG", "line\nbreak.png"]):
        write(root / "10" / name, number)
    write(root / "9" / "x.png", 90)
    write(root / "B c" / "x.png", 91)
    assert seen(grey(root)) == [
        *((number, "10") for number in (0, 1, 2, 3, 5, 4)), (90, "9"), (91, "B c"),
    ]  # fmt: skip


def test_names_that_are_not_utf8(root: Path) -> None:
    two_classes(root)
    shutil.copy(root / "a" / "1.jpg", os.fsdecode(os.fsencode(root / "a") + b"/\xff.jpg"))
    assert [value for value, _ in seen(grey(root))] == [1, 2, 1, 101, 102]
    shutil.copytree(root / "a", os.fsdecode(os.fsencode(root) + b"/\xfe"))
    assert r"the name of the class '\udcfe' is not UTF-8" in problem(root)


def test_hidden_and_other_files_are_passed_over_and_the_others_named(root: Path) -> None:
    two_classes(root)
    for name in (".DS_Store", "a/._1.jpg", "a/Thumbs.db", ".git/x.jpg", "a/.hidden/x.jpg", "__MACOSX/a/1.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"junk")
    assert grey(root).load().provenance.notes == ""
    (root / "README.txt").write_text("about")
    (root / "a" / "1.txt").write_text("caption")
    assert len(seen(grey(root))) == 4
    assert grey(root).load().provenance.notes == "passed over, being no images: 'README.txt', 'a/1.txt'"


def test_links_are_followed_and_circles_found(root: Path) -> None:
    two_classes(root / "real")
    (root / "linked").mkdir()
    (root / "linked" / "a").symlink_to(root / "real" / "a")
    write(root / "linked" / "c" / "x.png", 9)
    (root / "linked" / "c" / "y.png").symlink_to(root / "real" / "b" / "1.png")
    assert seen(grey(root / "linked")) == [(1, "a"), (2, "a"), (9, "c"), (101, "c")]
    (root / "linked" / "c" / "again").symlink_to(root / "linked" / "c")
    assert "again' is a link to a folder that it lies in" in problem(root / "linked")


# -- what is wrong ----------------------------------------------------------------------------------------------------
def test_images_that_are_in_no_class(root: Path) -> None:
    two_classes(root)
    write(root / "stray.JPG", 1)
    assert "images that are in no folder of a class: 'stray.JPG'" in problem(root)
    two_classes(root / "split" / "train")
    write(root / "split" / "test" / "one.png", 1)
    assert "test' has images that are in no folder of a class: 'one.png'" in problem(root / "split")


def test_classes_that_are_empty_alone_or_only_tested(root: Path) -> None:
    two_classes(root)
    (root / "c").mkdir()
    (root / "d" / "deeper").mkdir(parents=True)
    (root / "d" / "deeper" / "notes.txt").write_text("")
    assert "folders of classes without an image: 'c', 'd'" in problem(root)
    assert len(seen(grey(root, ignored_folders=("c", "d")))) == 4
    two_classes(root / "split" / "train")
    write(root / "split" / "test" / "z" / "x.png", 1)
    assert "only the test split has the classes 'z'" in problem(root / "split")
    write(root / "one" / "a" / "x.png", 1)
    assert "only the class 'a', so there is nothing to tell apart" in problem(root / "one")
    (root / "none").mkdir()
    assert "no class, so" in problem(root / "none")


def test_all_files_that_cannot_be_decoded_are_counted_and_ten_are_named(root: Path, isolated_home: Path) -> None:
    two_classes(root)
    (root / "a" / "empty.jpg").touch()
    (root / "b" / "text.jpg").write_text("no image")
    content = (root / "a" / "1.jpg").read_bytes()
    (root / "b" / "cut.jpg").write_bytes(content[: len(content) // 2])
    said = problem(root)
    assert "3 of 7 images cannot be used: 'a/empty.jpg' (it is empty), 'b/cut.jpg' (" in said
    assert "'b/text.jpg' (it is no JPEG" in said
    for number in range(80):
        (root / "a" / f"bad{number:02}.png").touch()
    said = problem(root)
    assert "83 of 87 images cannot be used: 'a/bad00.png'" in said
    assert "'a/bad09.png' (it is empty), and 73 more" in said
    assert "bad10" not in said
    assert not list(isolated_home.glob("cache/*/*/")), "nothing half made is left"


def test_formats_that_are_not_read_and_what_is_no_file(root: Path) -> None:
    two_classes(root)
    for name in ("photo.HEIC", "scan.tif"):
        (root / "a" / name).write_bytes(b"whatever")
    (root / "b" / "dangling.png").symlink_to(root / "nothing.png")
    os.mkfifo(root / "b" / "pipe.jpg")
    said = problem(root)
    assert "4 of 8 images cannot be used: 'a/photo.HEIC' (.HEIC is not read here: convert it" in said
    assert "'b/dangling.png' (it is a link to nothing" in said
    assert "'b/pipe.jpg' (" in said


def test_files_and_folders_without_permission(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused here, because to root nothing is."""
    two_classes(root)
    read = image_folder.sha256_file

    def refuse(path: Path) -> str:
        if path.name == "2.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    with monkeypatch.context() as patched:
        patched.setattr(image_folder, "sha256_file", refuse)
        assert "1 of 4 images cannot be used: 'b/2.png' (Permission denied)" in problem(root)
    listed = Path.iterdir

    def closed(path: Path) -> Any:
        if path.name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", closed)
    assert "/b' cannot be read: Permission denied" in problem(root)


def test_a_file_that_changes_while_the_folder_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_classes(root)
    begin = image_folder._empty

    def changing(*arguments: Any) -> Any:
        write(root / "b" / "1.png", 200)
        return begin(*arguments)

    monkeypatch.setattr(image_folder, "_empty", changing)
    assert "1 of 4 images cannot be used: 'b/1.png' (it changed while the folder was read)" in problem(root)


# -- the cache --------------------------------------------------------------------------------------------------------
@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each file that is decoded."""
    calls: list[int] = []
    call = Decoder.__call__

    def counted(self: Decoder, content: bytes) -> np.ndarray:
        calls.append(len(content))
        return call(self, content)

    monkeypatch.setattr(Decoder, "__call__", counted)
    return calls


def test_files_are_decoded_once_and_again_when_anything_changes(tmp_path: Path, decoded: list[int]) -> None:
    root = two_classes(tmp_path / "pets")
    digests = {grey(root).load().digest(), grey(root).load().digest()}
    assert (len(digests), len(decoded)) == (1, 4)
    image = grey(root).load().splits["train"]["image"]
    assert isinstance(image, np.memmap)
    assert not image.flags.writeable
    for changed in (
        lambda: grey(root, background=0),
        lambda: ImageFolder(root, 5, colour="grey"),
        lambda: ImageFolder(root, 4),
        lambda: grey(root, fit="stretch"),
        lambda: write(root / "a" / "1.jpg", 3) and grey(root),
        lambda: write(root / "a" / "3.jpg", 4) and grey(root),
    ):
        decoded.clear()
        digests.add(changed().load().digest())
        assert len(decoded) in (4, 5)
    assert len(digests) == 5, "for these files, background and fit do not matter"
    decoded.clear()
    (root / "a").rename(root / "A")
    assert seen(grey(root)) == [(3, "A"), (2, "A"), (4, "A"), (101, "b"), (102, "b")]
    assert not decoded


def test_another_pillow_decodes_again(tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    root = two_classes(tmp_path / "pets")
    grey(root).load()
    monkeypatch.setattr(image_folder, "decoder_versions", lambda: {"pil": "99"})
    assert "Pillow 99" in grey(root).load().provenance.fidelity
    assert len(decoded) == 8


def test_of_two_that_want_the_same_one_decodes(root: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    both, digest_of = threading.Barrier(2), image_folder.digest_of

    def together(value: Any) -> str:
        both.wait(600)
        return digest_of(value)

    monkeypatch.setattr(image_folder, "digest_of", together)
    source = grey(two_classes(root))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: source.load().digest(), range(2))
    assert first == second
    assert len(decoded) == 4


def test_a_corrupt_cache_is_quarantine_and_what_a_killed_process_left_is_removed(
    tmp_path: Path, decoded: list[int], isolated_home: Path
) -> None:
    root = two_classes(tmp_path / "pets")
    before = grey(root).load().digest()
    (made,) = isolated_home.glob("cache/image-folder/*/images.npy")
    content = bytearray(made.read_bytes())
    content[-1] ^= 1
    made.write_bytes(content)
    leftover = made.parent.with_name(f".tmp-{made.parent.name}-1-dead")
    leftover.mkdir()
    decoded.clear()
    assert grey(root).load().digest() == before
    assert len(decoded) == 4
    assert not leftover.exists()
    assert made.parent.with_name(f"{made.parent.name}.corrupt-1").is_dir()


def test_an_interruption_does_not_wait_for_all_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(100):
        write(root / "ab"[number % 2] / f"{number}.png", number)
    calls: list[Path] = []
    ended = threading.Event()

    def read(path: Path) -> str:
        calls.append(path)
        if len(calls) > 1:
            assert ended.wait(600)
        return ""

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            ended.set()
            super().shutdown(wait=wait)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(image_folder, "sha256_file", read)
    monkeypatch.setattr(image_folder, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(image_folder, "_BLOCK", 1)
    monkeypatch.setattr("joblib.cpu_count", lambda: 1)
    monkeypatch.setattr("tqdm.tqdm.update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        grey(root).load()
    assert len(calls) <= 2


def test_whatever_ends_the_decoding_leaves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, isolated_home: Path
) -> None:
    def interrupted(self: Decoder, content: bytes) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(Decoder, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grey(two_classes(root)).load()
    assert not [path for path in isolated_home.glob("cache/image-folder/*") if path.is_dir()]


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolated_home: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        grey(two_classes(tmp_path / "pets")).load()
    assert not [path for path in isolated_home.glob("cache/image-folder/*") if path.is_dir()]


# -- further on -------------------------------------------------------------------------------------------------------
def test_a_snapshot_is_made_of_it(tmp_path: Path) -> None:
    from mlpipes.workloads.image_classification import ImageClassification, ImageHyperparameters

    root = tmp_path / "pets"
    for number in range(60):
        write(root / "ab"[number % 2] / f"{number}.png", 3 * number)
    write(root / "a" / "again.png", 0)
    workload = ImageClassification(
        grey(root), SplitPlan(0.1, test_fraction=0.2, stratify_by="label"), ImageHyperparameters
    )
    snapshot, _ = snapshot_of(Store(tmp_path / "store"), workload.source.load().digest(), workload)
    assert snapshot.counts == {"train": 42, "validation": 6, "test": 12}
    assert snapshot.meta["duplicates"]["train_rows_dropped_because_repeated"] == 1
    values = [int(v) for split in snapshot.counts for v in snapshot.columns(split)["image"][:, 0, 0, 0]]
    assert sorted(values) == [3 * number for number in range(60)]
    train = snapshot.columns("train")["image"]
    assert snapshot.meta["statistics"]["mean"] == [pytest.approx(float(train.mean()))]
