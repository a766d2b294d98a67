"""Batch inference: all samples of a file, in chunks that are published one by one, so that what was killed goes on.

A chunk is computed by one of several processes with the program, the shapes and the one thread of the endpoint: the same
bits, whatever the number of processes, and however often it was killed.
"""

import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from mlpipes.data.image_file import Decoder
from mlpipes.errors import ConfigError, CorruptionError, DataError, TrainingFailedError
from mlpipes.serving.model import ServedModel, load
from mlpipes.serving.pictures import decoder_for, pictures
from mlpipes.serving.signature import rows_of
from mlpipes.serving.tables import Chunk, check_kind, chunks
from mlpipes.store.files import check_writable, digest_of, open_published, publishing, quarantine, sha256_file
from mlpipes.store.layout import Store
from mlpipes.workloads.golden import Values

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 1000
"""Samples of a chunk."""
_KIND, _VERSION, _FILE = "predictions", 2, "answers.parquet"
_BREAKS = 3
"""How often processes may die without a chunk in between."""
_COMPRESSION = "zstd"
_LABEL = "predicted_label"


@dataclass(frozen=True)
class Job:
    """Samples of a file, answered by one version of a model."""

    folder: Path
    """Of the model, in the store."""
    model: ServedModel
    source: Path
    place: Path
    """Where its chunks are published."""
    digest: str
    """SHA-256 of the source."""
    files: tuple[str, ...] = ()
    """Of the pictures that are its samples, if they are those of a folder."""
    beyond: set[int] = field(default_factory=set)
    """Numbers of the chunks with values that the training data cannot have."""

    @classmethod
    def of(
        cls, folder: Path, source: Path, store: Store, decoder: Decoder | None = None, model_id: str | None = None
    ) -> "Job":
        """The job of these very bytes and this very model, begun before or not; `decoder` is for folders of pictures.

        `model_id` tells the model from all others of its name where the name of its folder does not.

        Raises DataError for a file or folder that the model cannot read.
        """
        model, files = load(folder), ()
        if source.is_dir():
            source, files = pictures(source, decoder_for(model.signature, decoder))
        check_kind(source, model.signature)
        identity: dict[str, Any] = {"model": model_id or folder.name, "name": model.name}
        digest = sha256_file(source)
        identity |= {"input": digest, "rows": ROWS, "v": _VERSION}
        if files:
            identity["files"] = digest_of(files)
        return cls(folder, model, source, store.root / "predictions" / digest_of(identity)[:24], digest, files)

    def chunk(self, number: int) -> Path:
        """Where a chunk's answers are published."""
        return self.place / f"{number:08d}"

    def run(self, target: Path, workers: int, done: Callable[[int, bool], None] = lambda rows, computed: None) -> int:
        """Answer all samples, and write them into a Parquet or CSV file; returns how many there are.

        `done` hears of each chunk its rows, and whether they were computed now. Raises DataError for samples that the
        model does not take or an input that changes meanwhile, and TrainingFailedError where processes die again and
        again; what was published before such an end stays.
        """
        check_target(target)
        self.place.mkdir(parents=True, exist_ok=True)
        with FileLock(self.place / ".lock"):  # who else has the same to do finds it done
            self._compute(workers, done)
            return self._joined(target)

    def _changed(self) -> DataError:
        return DataError(
            f"{self.source} changed while it was answered; nothing was written. Start again when nobody writes it"
        )

    def _compute(self, workers: int, done: Callable[[int, bool], None]) -> None:
        breaks = 0
        while True:
            before = sum(1 for _ in self.place.iterdir())
            try:
                self._pass(workers, done)
            except BrokenProcessPool as error:
                breaks = 0 if sum(1 for _ in self.place.iterdir()) > before else breaks + 1
                if breaks >= _BREAKS:
                    raise TrainingFailedError(
                        f"a process that computed was killed {breaks} times without finishing a chunk; memory may be short "
                        "(see the kernel's log). Try --workers 1; what is done is kept"
                    ) from error
                done = _unheard(done)
                continue
            return

    def _pass(self, workers: int, done: Callable[[int, bool], None]) -> None:
        """Over all chunks once; those that are published are left out."""
        context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
        running: dict[Future[int], int] = {}
        with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(self.folder,)) as pool:
            try:
                for chunk in chunks(self.source, self.model.signature, ROWS):
                    if exceeds(chunk.values, self.model):
                        self.beyond.add(chunk.number)
                    if self._is_done(chunk):
                        done(rows_of(chunk.values), False)
                        continue
                    if len(running) > 2 * workers:  # what waits is in memory
                        _heard(running, done)
                    running[pool.submit(_answer, chunk, self.chunk(chunk.number))] = rows_of(chunk.values)
                while running:
                    _heard(running, done)
            except BaseException:
                pool.shutdown(cancel_futures=True)  # what is being computed is published, what waits is not begun
                raise

    def _is_done(self, chunk: Chunk) -> bool:
        place = self.chunk(chunk.number)
        try:
            found = open_published(place, kind=_KIND)
        except FileNotFoundError:
            return False
        except CorruptionError:
            quarantine(place)
            return False
        if found.meta["input"] != chunk.digest():  # of a source that changed while it was answered
            shutil.rmtree(place)
            return False
        return True

    def _joined(self, target: Path) -> int:
        import pyarrow.csv as pa_csv
        import pyarrow.parquet as pq

        temporary, writer, rows = target.with_name(f".{target.name}.{os.getpid()}"), None, 0
        try:
            for table in self._tables():
                rows += len(table)
                flat = table if target.suffix.lower() == ".parquet" else _flattened(table)
                if writer is None:
                    options: Any = {"compression": _COMPRESSION}
                    writer = (
                        pq.ParquetWriter(temporary, flat.schema, **options)
                        if target.suffix.lower() == ".parquet"
                        else pa_csv.CSVWriter(temporary, flat.schema)
                    )
                writer.write_table(flat.cast(writer.schema) if isinstance(writer, pq.ParquetWriter) else flat)
            if writer is None:
                raise DataError(f"{self.source} has no samples")
            writer.close()
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            if sha256_file(self.source) != self.digest:
                raise self._changed()
            temporary.replace(target)
        except OSError as error:
            if error.filename is None:  # Arrow does not say which file the disk is too full for
                raise OSError(error.errno, str(error.strerror or error), str(target)) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
        return rows

    def _tables(self) -> Iterator["pa.Table"]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for chunk in chunks(self.source, self.model.signature, ROWS):
            found = open_published(self.chunk(chunk.number), kind=_KIND)
            if found.meta["input"] != chunk.digest():
                raise self._changed()
            answers = pq.read_table(found.path / _FILE)
            count = len(answers)
            table = chunk.table if chunk.table is not None else pa.table({})
            columns: dict[str, Any] = {"row": pa.array(np.arange(chunk.first, chunk.first + count))}
            if self.files:
                columns["file"] = pa.array(self.files[chunk.first : chunk.first + count])
            columns |= {name: table[name] for name in table.column_names}
            columns |= {name: answers[name] for name in answers.column_names}
            for name, value in (("model", f"{self.model.name}/{self.model.version}"), ("weights", self.model.weights)):
                columns[f"{name}_of_prediction"] = pa.array([value] * count)
            yield pa.table(columns)


def check_target(target: Path) -> None:
    """Raises ConfigError for a file that answers cannot be written to: to be asked before they are computed."""
    if target.suffix.lower() not in (".parquet", ".csv"):
        raise ConfigError(f"the result is a file that ends with .parquet or .csv, not {target.name}")
    if not target.parent.is_dir():
        raise ConfigError(f"the folder {target.parent} is not there; make it first")
    if target.is_dir():
        raise ConfigError(f"{target} is a folder; name a file")
    check_writable(target.parent)


def exceeds(values: Values, model: ServedModel) -> bool:
    """Whether pixels are greater than any of those that a model was trained on can be, as where they have another scale."""
    maximum = model.about.get("pixel_maximum")
    return maximum is not None and isinstance(values, np.ndarray) and bool((values > maximum).any())


_MODEL: list[ServedModel] = []
"""Of a process that computes."""


def _start(folder: Path) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101 - it has started this
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    _MODEL.append(load(folder))


def _end_with(sentinel: Any) -> None:
    """Nobody ends a process whose parent was killed: it would wait for the next chunk for ever."""
    connection.wait([sentinel])
    os._exit(1)


def _answer(chunk: Chunk, place: Path) -> int:
    """Compute and publish a chunk; returns its rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (model,) = _MODEL
    table = pa.table(_named(model, model(chunk.values)))
    with publishing(place, kind=_KIND, version=_VERSION) as draft:
        pq.write_table(table, draft.path / _FILE, compression=_COMPRESSION)
        draft.meta |= {"first": chunk.first, "rows": len(table), "input": chunk.digest()}
    return len(table)


def _named(model: ServedModel, answer: Values) -> Mapping[str, Any]:
    """Answers by column, whose names are those of no column that is a sample's own."""
    import pyarrow as pa

    if not isinstance(answer, np.ndarray):
        return {f"predicted_{name}": pa.array(np.asarray(column).tolist()) for name, column in answer.items()}
    flat = answer.reshape(len(answer), -1)
    found: dict[str, Any] = {
        "prediction": pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
        if answer.ndim > 1
        else pa.array(answer)
    }
    names = model.about.get("class_names")
    if names and answer.shape[1:] == (len(names),):
        found[_LABEL] = pa.array([str(names[place]) for place in answer.argmax(axis=1)])
    return found


def labels_in(result: Path) -> list[str]:
    """The classes that a file of answers says; [] where the model knows none."""
    import pyarrow.csv as pa_csv
    import pyarrow.parquet as pq

    if result.suffix.lower() == ".parquet":
        names = pq.read_schema(result).names
        return pq.read_table(result, columns=[_LABEL])[_LABEL].to_pylist() if _LABEL in names else []
    table = pa_csv.read_csv(result, convert_options=pa_csv.ConvertOptions(column_types={_LABEL: "string"}))
    return table[_LABEL].to_pylist() if _LABEL in table.column_names else []


def _flattened(table: "pa.Table") -> "pa.Table":
    """For CSV, which has no lists: a column for each of their values."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns: dict[str, Any] = {}
    for name in table.column_names:
        column = table[name]
        if pa.types.is_fixed_size_list(column.type):
            for place in range(column.type.list_size):
                columns[f"{name}_{place}"] = pc.call_function("list_element", [column, pa.scalar(place)])
        else:
            columns[name] = column
    return pa.table(columns)


def _heard(running: dict[Future[int], int], done: Callable[[int, bool], None]) -> None:
    finished, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in finished:
        del running[future]
        done(future.result(), True)


def _unheard(done: Callable[[int, bool], None]) -> Callable[[int, bool], None]:
    """For another pass: chunks that were there, or were told of, are not told of again."""
    return lambda rows, computed: done(rows, computed) if computed else None
