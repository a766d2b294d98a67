"""A bounded sample of what was served: of each version and hour, summaries of some samples and answers, in the store.

What drift is looked for in. A crash loses what was served since the last writing, half a minute's at most.
"""

import asyncio
import random
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from mlpipes.errors import CorruptionError
from mlpipes.serving.later import Later
from mlpipes.serving.model import ServedModel
from mlpipes.serving.signature import rows_of, taken
from mlpipes.serving.summaries import summarized
from mlpipes.serving.traffic import Answered
from mlpipes.store.files import read_record, write_record
from mlpipes.store.layout import Store
from mlpipes.workloads.golden import Values

_KEPT = timedelta(hours=48)
_MOST_FILES = 500
"""Of all versions of a model: a server that starts again and again writes one each time."""
_EVERY = 30.0
_HOUR = "%Y%m%dT%H"
Summary = Mapping[str, np.ndarray]


def folder_of(store: Store, name: str, version: str, weights: str) -> Path:
    """Where the samples of a version lie."""
    return store.root / "served_samples" / name / f"{version}-{weights[:12]}"


@dataclass
class Reservoir:
    """Some of an hour's samples, each as likely as any other (Vitter 1985, doi:10.1145/3147.3165: algorithm R)."""

    path: Path
    size: int
    seen: int = 0
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By place."""
    changed: bool = False

    def places(self, count: int, generator: random.Random) -> dict[int, int]:
        """Places that some of the next `count` samples take, and which of them takes it."""
        found: dict[int, int] = {}
        for row in range(count):
            place = self.seen if self.seen < self.size else generator.randrange(self.seen + 1)
            self.seen += 1
            if place < self.size:
                found[place] = row
        return found

    def put(self, places: Mapping[int, int], model: ServedModel, values: Values, answer: Values) -> None:
        """Summarize the samples that take a place."""
        chosen = np.array(list(places.values()))
        columns = summarized(model, taken(values, chosen), taken(answer, chosen))
        for number, place in enumerate(places):
            self.rows[place] = {name: column[number] for name, column in columns.items()}
        self.changed = True

    def write(self) -> None:
        """Write it as it is, if it has changed."""
        if self.changed:
            rows = list(self.rows.values())
            columns = {name: [row[name] for row in rows] for name in rows[0]}
            write_record(self.path, {"seen": self.seen, "columns": columns})
            self.changed = False


class Sampler:
    """Keeps some of what a server answers. Nobody waits for it: what there is no time for is dropped, and counted."""

    def __init__(
        self,
        store: Store,
        size: int,
        dropped: Callable[[], None],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store, self._size, self._dropped, self._now = store, size, dropped, now
        self._generator, self._token = random.Random(), secrets.token_hex(4)  # noqa: S311 - no secret
        self._hours: dict[Path, Reservoir] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampling")
        self._later = Later(self._put, dropped)
        self._writing = asyncio.get_running_loop().create_task(self._write_on())

    def offer(self, answered: Answered) -> None:
        """Keep some of a request's samples later, if chance says so."""
        model, now = answered.model, self._now()
        folder = folder_of(self._store, model.name, model.version, model.weights)
        path = folder / f"{now:{_HOUR}}-{self._token}.json"
        if path not in self._hours:
            self._hours[path] = Reservoir(path, self._size)
        reservoir = self._hours[path]
        if places := reservoir.places(rows_of(answered.values), self._generator):
            self._later.offer((reservoir, places, answered), answered.size)

    async def close(self) -> None:
        """Write what is there, and keep no more."""
        self._writing.cancel()
        with suppress(asyncio.CancelledError):
            await self._writing
        await self._later.close()
        await self.write()
        self._thread.shutdown(wait=False)

    async def write(self) -> None:
        """Write what has changed, and remove what is old."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._write, list(self._hours.values()))
        except Exception:  # a store that cannot be written to is no reason not to serve
            self._dropped()
        present, oldest = (f"{moment:{_HOUR}}" for moment in (self._now(), self._now() - _KEPT))
        for path, each in list(self._hours.items()):
            if path.name < (oldest if each.changed else present):
                del self._hours[path]

    def _write(self, hours: list[Reservoir]) -> None:
        for each in hours:
            each.write()
        for root in {each.path.parents[1] for each in hours}:
            _tidy(root, self._now() - _KEPT)

    async def _write_on(self) -> None:
        while True:
            await asyncio.sleep(_EVERY)
            await self.write()

    async def _put(self, thing: tuple[Reservoir, Mapping[int, int], Answered]) -> None:
        reservoir, places, answered = thing
        put = (places, answered.model, answered.values, answered.answer)
        await asyncio.get_running_loop().run_in_executor(self._thread, reservoir.put, *put)


def _tidy(root: Path, oldest: datetime) -> None:
    files = sorted(root.glob("*/*.json"), key=lambda path: path.name, reverse=True)
    for number, path in enumerate(files):
        if number >= _MOST_FILES or path.name < f"{oldest:{_HOUR}}":
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Sample:
    """Summaries of what a version has served."""

    seen: int
    """Samples that were served, of which these are some."""
    columns: Summary

    @property
    def n(self) -> int:
        """How many there are."""
        return len(next(iter(self.columns.values()), ()))


def served_since(folder: Path, since: datetime) -> Sample:
    """What was kept of the hours that began since then, each hour with as much weight as it had requests.

    An unreadable file is left out.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        if path.name >= f"{since:{_HOUR}}":
            with suppress(CorruptionError, OSError):
                found.append(read_record(path))
    if not found:
        return Sample(0, {})
    generator, names = np.random.default_rng(0), list(found[-1]["columns"])
    found = [each for each in found if list(each["columns"]) == names]  # others: of before figures were other ones
    kept = [len(each["columns"][names[0]]) for each in found]
    rate = min(count / each["seen"] for count, each in zip(kept, found, strict=True))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for count, each in zip(kept, found, strict=True):
        rows = generator.permutation(count)[: round(each["seen"] * rate)]
        for name in names:
            parts[name].append(np.array(each["columns"][name])[rows])
    columns = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    return Sample(sum(each["seen"] for each in found), columns)
