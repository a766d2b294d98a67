"""Batch inference: the bits of the evaluation, each row once, whatever was killed, and what files may be."""

import os
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from mlpipes.cli.app import app
from mlpipes.data.image_file import Decoder
from mlpipes.errors import ConfigError, DataError
from mlpipes.serving import batch
from mlpipes.serving.batch import Job
from mlpipes.serving.current import Registry, Wanted
from mlpipes.serving.model import ServedModel, fetched, load
from mlpipes.serving.pictures import decoder_for
from mlpipes.serving.signature import Column, Signature
from mlpipes.store.layout import Store
from mlpipes_tests import disks
from mlpipes_tests.disks import fill
from mlpipes_tests.sandbox import CHECKOUT
from mlpipes_tests.serving import held_batch
from mlpipes_tests.serving.models import IMAGES, NAME, champion, registered, tracker_in
from mlpipes_tests.waiting import LIMIT_SECONDS, until

TEXTS = Signature((Column("text", "str", ()),), (), is_tensor=False, answers_tensor=False)
small_disk = disks.small_disk
TIMES = 180
"""How often `IMAGES` are repeated: some chunks."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("batch")


@pytest.fixture(scope="module")
def expected(home: Path) -> np.ndarray:
    """Logits that the evaluation has of the rows of images.npy; the model is champion."""
    tracker = tracker_in(home)
    version, evaluated = registered(tracker, 1)
    champion(tracker, version)
    np.save(home / "images.npy", np.tile(IMAGES, (TIMES, 1, 1, 1)))
    return np.tile(evaluated, (TIMES, 1))


def command(home: Path, output: str, *options: str, held: bool = False) -> "subprocess.Popen[bytes]":
    program = [sys.executable, "-m", held_batch.__name__] if held else [f"{CHECKOUT}/.venv/bin/mlpipes"]
    environment = os.environ | {"MLPIPES_HOME": str(home)}
    words = ("predict", "digits", "--input", str(home / "images.npy"), "--output", str(home / output), *options)
    with (home / "predict.log").open("wb") as log:
        return subprocess.Popen([*program, *words], env=environment, cwd=CHECKOUT, stdout=log, stderr=log)


def published(home: Path) -> list[Path]:
    return sorted((home / "store" / "predictions").glob("*/0*"))


def descendants(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.chaos
def test_killed_in_the_middle_it_goes_on_and_each_row_has_the_bits_of_the_evaluation(
    home: Path, expected: np.ndarray
) -> None:
    first = command(home, "killed.parquet", "--workers", "1", held=True)

    def ended() -> str:
        return (home / "predict.log").read_text() if first.poll() is not None else ""

    until(lambda: len(published(home)) == held_batch.HELD, "the chunks before the held one are published", vain=ended)
    family = descendants(first)
    first.kill()
    first.wait()
    until(lambda: not any(each.is_running() for each in family), "nobody computes on for a parent that is gone")
    assert not (home / "killed.parquet").exists()
    before = {path: path.stat().st_ino for path in published(home)}
    assert len(before) == held_batch.HELD

    second = command(home, "killed.parquet", "--workers", "2")
    assert second.wait(LIMIT_SECONDS) == 0, (home / "predict.log").read_text()
    assert before.items() <= {path: path.stat().st_ino for path in published(home)}.items(), "what was there is kept"
    assert "were answered before" in " ".join((home / "predict.log").read_text().split())
    found = pq.read_table(home / "killed.parquet")
    assert found["row"].to_pylist() == list(range(len(expected)))
    assert np.array_equal(np.array(found["prediction"].to_pylist(), dtype=np.float32), expected)
    assert found["predicted_label"].to_pylist()[:61] == [str(n) for n in expected[:61].argmax(1)]
    assert set(found["model_of_prediction"].to_pylist()) == {f"{NAME}/1"}
    assert set(found["weights_of_prediction"].to_pylist()) == {f"{1:064x}"}
    whole = (home / "killed.parquet").read_bytes()

    # A chunk that has changed is computed again; the result is the same file, byte for byte.
    next(published(home)[0].glob("*.parquet")).write_bytes(b"something else")
    assert command(home, "again.parquet").wait(LIMIT_SECONDS) == 0, (home / "predict.log").read_text()
    assert (home / "again.parquet").read_bytes() == whole
    assert command(home, "flat.csv").wait(LIMIT_SECONDS) == 0
    flat = pa_csv.read_csv(home / "flat.csv")
    assert np.array_equal(np.float32(flat["prediction_3"].to_numpy()), expected[:, 3])


@pytest.mark.chaos
def test_a_process_that_is_killed_again_and_again_is_told(
    home: Path, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlpipes.errors import TrainingFailedError

    job = job_of(home, home / "images.npy", tmp_path)
    monkeypatch.setattr(batch, "_answer", _dies)
    with pytest.raises(TrainingFailedError, match="killed 3 times without finishing a chunk"):
        job.run(tmp_path / "x.parquet", 1)
    assert not (tmp_path / "x.parquet").exists()


def _dies(*_: Any) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_pixels_of_another_scale_than_the_training_datas_are_told(
    home: Path, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures of the usual 0 to 255, asked of digits, whose pixels are 0 to 16: it calls nearly all of them a one."""
    monkeypatch.setattr(batch, "ProcessPoolExecutor", Here)
    for name, factor in (("same", 1), ("other", 15)):
        np.save(tmp_path / f"{name}.npy", IMAGES * np.uint8(factor))
        words = ("--input", str(tmp_path / f"{name}.npy"), "--output", str(tmp_path / f"{name}.csv"), "--workers", "1")
        environment = {"MLPIPES_HOME": str(home), "COLUMNS": "400"}
        done = CliRunner(env=environment).invoke(app, ["predict", "digits", *words])
        assert done.exit_code == 0, done.output
        assert (f"Pixels of {name}.npy are greater than 16" in done.output) == (name == "other")


class Here:
    """Computes in this process, which has imported all that it takes."""

    def __init__(self, workers: int, context: Any, initializer: Any, initargs: tuple[Path]) -> None:
        self.model = load(*initargs)

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *_: object) -> None: ...

    def shutdown(self, cancel_futures: bool) -> None: ...

    def submit(self, answer: Any, chunk: Any, place: Path) -> "Future[int]":
        batch._MODEL[:] = [self.model]
        done: Future[int] = Future()
        done.set_result(answer(chunk, place))
        batch._MODEL.clear()
        return done


def test_ctrl_c_says_that_the_same_command_goes_on(
    home: Path, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Job, "run", interrupted)
    words = ("--input", str(home / "images.npy"), "--output", str(tmp_path / "x.csv"))
    done = CliRunner(env={"MLPIPES_HOME": str(home)}).invoke(app, ["predict", "digits", *words])
    assert (done.exit_code, "The same command goes on where it was." in done.output) == (130, True)


def job_of(home: Path, source: Path, store: Path) -> Job:
    tracker = tracker_in(home)
    registered = Registry(lambda: tracker, Wanted(NAME, "1"), Store(store)).wanted_now()
    return Job.of(fetched(tracker, registered, Store(store)), source, Store(store))


def test_answers_to_an_input_that_changes_meanwhile_are_never_those_of_what_it_was(
    home: Path, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "ProcessPoolExecutor", Here)
    source, result, rows = tmp_path / "x.npy", tmp_path / "x.parquet", 4500
    images = np.load(home / "images.npy")[:rows]
    np.save(source, images)

    def overwrite(*_: Any) -> None:
        with source.open("r+b") as stream:  # in place, as long as it was
            np.save(stream, images[::-1])

    def killed(*_: Any) -> None:
        overwrite()
        if len(list(job.place.glob("0*"))) == 5:
            raise KeyboardInterrupt

    job = job_of(home, source, tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        job.run(result, 1, killed)
    np.save(source, images)
    job = job_of(home, source, tmp_path / "store")
    assert len(list(job.place.glob("0*"))) == 5, "the last of them to what had taken the place of it"
    with pytest.raises(DataError, match=r"x.npy changed while it was answered; nothing was written"):
        job.run(result, 1, overwrite)
    assert not result.exists()
    np.save(source, images)
    computed = []
    assert job.run(result, 1, lambda rows, now: computed.append(now)) == rows
    assert set(computed) == {True, False}, "what was to the input that it is again was kept, and nothing else"
    found = np.stack(pq.read_table(result)["prediction"].to_pylist()).astype(np.float32)
    assert np.array_equal(found, expected[:rows])


def test_an_array_that_becomes_shorter_meanwhile_is_told(
    home: Path, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "ProcessPoolExecutor", Here)
    np.save(tmp_path / "x.npy", np.load(home / "images.npy")[:4500])
    job = job_of(home, tmp_path / "x.npy", tmp_path / "store")
    with pytest.raises(DataError, match=r"x\.npy became shorter while it was read"):
        job.run(tmp_path / "x.csv", 1, lambda *_: os.truncate(tmp_path / "x.npy", 5000))
    assert not (tmp_path / "x.csv").exists()


def test_a_disk_that_is_too_full_for_the_result_is_told_with_its_name(
    home: Path, expected: np.ndarray, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "ProcessPoolExecutor", Here)
    job = job_of(home, home / "images.npy", home / "store")
    ballast, target = fill(small_disk), small_disk / "x.parquet"
    with pytest.raises(OSError, match=r"No space left on device.*x\.parquet"):
        job.run(target, 1)
    assert list(small_disk.iterdir()) == [ballast]


def test_files_that_the_model_cannot_read_are_told(home: Path, expected: np.ndarray, tmp_path: Path) -> None:
    for name, content, says in (
        ("a.csv", b"text\nx", r"a file that ends with \.npy, not a\.csv"),
        ("absent.npy", None, "is not there"),
        ("odd.npy", b"something", "is no array of NumPy"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=says):
            job_of(home, tmp_path / name, tmp_path).run(tmp_path / "x.parquet", 1)
    bad = np.tile(IMAGES, (1, 1, 1, 1)).astype(np.float64)
    bad[40, 0, 3, 5] = 0.5
    np.save(tmp_path / "bad.npy", bad)
    with pytest.raises(
        DataError, match=r"bad\.npy, rows 0 to 60: samples\[40\]\[0\]\[3\]\[5\]: 0\.5 is no whole number"
    ):
        job_of(home, tmp_path / "bad.npy", tmp_path).run(tmp_path / "x.parquet", 1)
    np.save(tmp_path / "empty.npy", IMAGES[:0])
    with pytest.raises(DataError, match="has no samples"):
        job_of(home, tmp_path / "empty.npy", tmp_path).run(tmp_path / "x.parquet", 1)
    good = job_of(home, home / "images.npy", tmp_path)
    with pytest.raises(ConfigError, match=r"ends with \.parquet or \.csv"):
        good.run(tmp_path / "x.xlsx", 1)
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(ConfigError, match="is a folder; name a file"):
        good.run(tmp_path / "folder.parquet", 1)
    with pytest.raises(ConfigError, match="/proc cannot be written to"):
        good.run(Path("/proc/x.csv"), 1)
    assert not good.place.exists(), "before anything is computed"
    with pytest.raises(ConfigError, match="is not there; make it first"):
        good.run(tmp_path / "no" / "x.csv", 1)


def test_pictures_in_a_folder_are_answered_with_their_names(home: Path, expected: np.ndarray, tmp_path: Path) -> None:
    for number, pixels in enumerate(IMAGES):
        (path := tmp_path / "in" / f"{number % 3}" / f"{number}.png").parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[0]).save(path)
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    assert job_of(home, tmp_path / "in", tmp_path).run(tmp_path / "x.parquet", 1) == len(IMAGES)
    found = pq.read_table(tmp_path / "x.parquet")
    answers = dict(zip(found["file"].to_pylist(), found["prediction"].to_pylist(), strict=True))
    wanted = {f"{number % 3}/{number}.png": expected[number].tolist() for number in range(len(IMAGES))}
    assert answers == wanted
    place = job_of(home, tmp_path / "in", tmp_path).place
    (tmp_path / "in" / "0" / "0.png").rename(tmp_path / "in" / "0" / "00.png")
    assert job_of(home, tmp_path / "in", tmp_path).place != place, "another name is another answer"
    os.rename(os.fsencode(tmp_path / "in" / "0" / "00.png"), os.fsencode(tmp_path / "in") + b"/caf\xe9.png")  # noqa: PTH104
    with pytest.raises(DataError, match=r"caf\\udce9\.png'?: its name is not in UTF-8"):
        job_of(home, tmp_path / "in", tmp_path)
    os.remove(os.fsencode(tmp_path / "in") + b"/caf\xe9.png")  # noqa: PTH107
    (tmp_path / "in" / "bad.png").write_bytes(b"something")
    with pytest.raises(DataError, match=r"bad\.png"):
        job_of(home, tmp_path / "in", tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="has no image"):
        job_of(home, tmp_path / "none", tmp_path)


def test_pictures_are_read_as_those_that_the_model_was_trained_on() -> None:
    small = Signature((Column("", "uint8", (3, 4, 6)),), (), is_tensor=True, answers_tensor=True)
    assert decoder_for(small, None) == Decoder(4, 6, "rgb", "cover", 255)
    assert decoder_for(small, Decoder(9, 9, "grey", "contain", 7)) == Decoder(4, 6, "rgb", "contain", 7)
    for shape, says in (((3, -1, -1), "any size"), ((12,), "takes none")):
        other = Signature((Column("", "uint8", shape),), (), is_tensor=True, answers_tensor=True)
        with pytest.raises(DataError, match=says):
            decoder_for(other, None)
    with pytest.raises(DataError, match="takes none"):
        decoder_for(TEXTS, None)


def test_columns_of_answers_never_hide_those_of_samples() -> None:
    def answers(values: Any) -> Any:
        return {"label": np.array(["x"], dtype=object), "p(x)": np.array([1.0])}

    model = ServedModel("m", "1", "", "", "", TEXTS, True, "", True, {}, answers)
    assert list(batch._named(model, answers(None))) == ["predicted_label", "predicted_p(x)"]
