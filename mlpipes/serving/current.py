"""Which version answers: an alias of MLflow's registry is followed, and a new version takes over between two batches."""

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mlpipes.errors import ConfigError, CorruptionError, UserError
from mlpipes.serving.model import RefusedError, Registered, ServedModel, fetched, load, opened
from mlpipes.store.files import MANIFEST, quarantine, read_record, write_record
from mlpipes.store.layout import Store
from mlpipes.tracking.models import registered_name
from mlpipes.tracking.runs import Tracker

_OF_REGISTRY = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"})
"""What MLflow says where there is no such alias, or no such version."""
_LONGEST_PAUSE = 60.0
"""Seconds between two attempts to load a version that cannot be fetched."""


@dataclass(frozen=True)
class Wanted:
    """What is to be served."""

    name: str
    """Of the registered model."""
    version: str | None = None
    """A certain one; None: whichever the alias points to."""
    alias: str = "champion"
    folder: Path | None = None
    """Where it was written out; None: it is in MLflow's registry."""

    def __str__(self) -> str:
        if self.folder is not None:
            return f"{self.name} in {self.folder}"
        return f"models:/{self.name}/{self.version}" if self.version else f"models:/{self.name}@{self.alias}"


def _remedy(wanted: Wanted) -> str:
    """What to do where a version or an alias is not there."""
    if wanted.version is None and wanted.alias != "champion":
        return (
            "Give a version that alias: client.set_registered_model_alias(name, alias, version) of mlflow.MlflowClient(), "
            "or MLflow's UI (`mlpipes dev --mlflow`)"
        )
    train = f"`mlpipes demo --workload {wanted.name.removeprefix(registered_name(''))}`"
    return f"Train one first ({train}), or name another --version or --alias"


class Source(Protocol):
    """Where a server finds out which version is wanted, and has it from."""

    @property
    def wanted(self) -> Wanted:
        """What is asked for."""
        ...

    @property
    def store(self) -> Store | None:
        """Where what belongs to serving is kept; None: nowhere."""
        ...

    def wanted_now(self) -> Registered:
        """The version that is wanted. Raises UserError if there is none, and OSError where that cannot be known now."""
        ...

    def get(self, registered: Registered) -> ServedModel:
        """A version, loaded and tried. Raises RefusedError where it cannot be served, and another error where not now."""
        ...

    def kept(self, why: OSError) -> ServedModel:
        """What was served last. Raises UserError where nothing was, with why it is asked for, or where it has changed."""
        ...


class Folder:
    """A version that was written out, without any registry; where another one takes its place, that one is wanted."""

    store: Store | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.wanted = Wanted(self._there().name, folder=path)

    def wanted_now(self) -> Registered:
        """The version that is there. Raises UserError if there is none, or where it is not whole."""
        found = self._there()
        if found.name != self.wanted.name:
            raise ConfigError(f"{self.path} has {found.name} by now; start the server again to serve it")
        return found

    def _there(self) -> Registered:
        write = "`mlpipes export WORKLOAD --output FOLDER` writes one"
        if not self.path.is_dir():
            raise ConfigError(f"{self.path} is no folder with a model; {write}")
        if not (self.path / MANIFEST).is_file():
            raise ConfigError(f"{self.path} was not written by `mlpipes export`, for it has no {MANIFEST}; {write}")
        return opened(self.path, verify=False)[1]

    def get(self, registered: Registered) -> ServedModel:
        """What is there by now, verified, loaded and tried."""
        return load(self.path)

    def kept(self, why: OSError) -> ServedModel:
        """Nothing is."""
        raise ConfigError(f"{self.path} cannot be read: {why}") from why


class Registry:
    """MLflow's registry, with what of it is kept in the store: a server starts and serves on while MLflow is away."""

    def __init__(self, connect: Callable[[], Tracker], wanted: Wanted, store: Store) -> None:
        self.connect, self.wanted, self.store = connect, wanted, store
        self.last = store.root / "served" / wanted.name / f"{wanted.version or wanted.alias}.json"
        """Where it is noted which folder was served last."""

    def wanted_now(self) -> Registered:
        """The version that is wanted. Raises ConfigError if there is none, and OSError if MLflow does not answer."""
        from mlflow.exceptions import MlflowException

        wanted = self.wanted
        try:
            client = self.connect().client
        except ConfigError as error:
            raise OSError(str(error)) from error
        try:
            if wanted.version is not None:
                found = client.get_model_version(wanted.name, wanted.version)
            else:
                found = client.get_model_version_by_alias(wanted.name, wanted.alias)
        except MlflowException as error:
            if error.error_code in _OF_REGISTRY:
                raise ConfigError(f"{wanted} is not registered in MLflow. {_remedy(wanted)}") from error
            raise OSError(f"MLflow does not answer: {error}") from error
        return Registered(wanted.name, str(found.version), str(found.source), dict(found.tags))

    def get(self, registered: Registered) -> ServedModel:
        """A version, loaded and tried. Raises RefusedError where it cannot be served, and another error where not now."""
        folder = fetched(self.connect(), registered, self.store)
        try:
            model = load(folder)
        except CorruptionError:
            quarantine(folder)  # and once more from the registry
            model = load(fetched(self.connect(), registered, self.store))
        with suppress(OSError):  # a store that cannot be written to is no reason not to serve
            write_record(self.last, {"folder": folder.name})
        return model

    def kept(self, why: OSError) -> ServedModel:
        """What was served last. Raises UserError where nothing was, with why it is asked for, or where it has changed."""
        try:
            return load(Path(self.last.parent / read_record(self.last)["folder"]))
        except (FileNotFoundError, KeyError):
            raise ConfigError(f"{why}. Also, {self.wanted} was never served from this home") from why


@dataclass
class _Refusal:
    """A version that is not served."""

    registered: Registered
    again: float
    """When it is tried again, by the monotonic clock; never: infinity."""
    pause: float
    said: str


class Current:
    """The model that answers now; `look` keeps it the one that is wanted."""

    def __init__(self, registry: Source, tell: Callable[[str], None], swapped: Callable[[ServedModel], None]) -> None:
        self.registry, self.tell, self.swapped = registry, tell, swapped
        self.model: ServedModel | None = None
        self._registered: Registered | None = None
        self._refused: _Refusal | None = None
        self._trouble = ""

    async def start(self) -> None:
        """Load the first. Raises UserError if there is none."""
        began = time.monotonic()
        try:
            registered = await asyncio.to_thread(self.registry.wanted_now)
        except OSError as error:
            self._trouble = str(error)
            self._take(await asyncio.to_thread(self.registry.kept, error), None)
            self.tell(f"{error}; serving what was served last")
        else:
            self._take(await asyncio.to_thread(self.registry.get, registered), registered)
        assert self.model is not None  # noqa: S101 - just taken
        self.tell(f"{describe(self.model)} is served, after {time.monotonic() - began:.1f} s")

    async def look(self, every: float = 1.0) -> None:
        """Change to the version that is wanted, if it is another one and can be served."""
        try:
            wanted = await asyncio.to_thread(self.registry.wanted_now)
        except (OSError, UserError) as error:
            if isinstance(error, UserError):
                self._do_without()
            if str(error) != self._trouble:
                self._trouble = str(error)
                self.tell(f"{error}; {self._meanwhile()}")
            return
        if self._trouble:
            self._trouble = ""
            self.tell(f"{self.registry.wanted} is found again")
        if self._is_served(wanted):
            self._registered, self._refused = wanted, None
            return
        if self._refused is not None and self._refused.registered != wanted:
            self._refused = None
        if self._refused is not None and time.monotonic() < self._refused.again:
            return
        try:
            found = await asyncio.to_thread(self.registry.get, wanted)
            served = self._served()
            if found.signature != served.signature or _classes(found) != _classes(served):
                raise RefusedError(
                    "it takes or answers something else than the version that is served, which clients would notice: "
                    "start the server again to serve it"
                )
        except Exception as error:
            self._refuse(wanted, error, every)
            return
        before = self.model
        self._take(found, wanted)
        self.tell(self._change(found, before))

    def _is_served(self, wanted: Registered) -> bool:
        if self.model is None:
            return False
        if self._registered is None:  # it was kept, and what it was is not known but for its number
            return wanted.version == self.model.version
        return (wanted.version, wanted.source) == (self._registered.version, self._registered.source)

    def _refuse(self, wanted: Registered, error: Exception, every: float) -> None:
        self._do_without()
        before, said = self._refused, str(error)
        pause = min(_LONGEST_PAUSE, 2 * before.pause if before else every)
        again = math.inf if isinstance(error, RefusedError) else time.monotonic() + pause
        if before is None or before.said != said:
            when = "" if math.isinf(again) else "; it is tried again"
            self.tell(f"version {wanted.version} is not served, and {self._meanwhile()}: {said}{when}")
        self._refused = _Refusal(wanted, again, pause, said)

    def _take(self, model: ServedModel, registered: Registered | None) -> None:
        self.model, self._registered, self._refused = model, registered, None
        self.swapped(model)

    # -- what is otherwise of a version that is not the one that clients know -----------------------------------------
    def _served(self) -> ServedModel:
        """The version that clients know: another one must take and answer the same."""
        assert self.model is not None  # noqa: S101 - started
        return self.model

    def _do_without(self) -> None:
        """There is none that could be served; who serves now serves on."""

    def _meanwhile(self) -> str:
        return f"version {self._served().version} is served on"

    def _change(self, found: ServedModel, before: ServedModel | None) -> str:
        return f"{describe(found)} is served" + (f", instead of version {before.version}" if before else "")


def await_first(source: Source, tell: Callable[[str], None], every: float) -> None:
    """Wait until there is a version to serve, with a look every so many seconds, and say once what is waited for."""
    said = ""
    while True:
        try:
            source.wanted_now()
        except ConfigError as error:
            if str(error) != said:
                said = str(error)
                tell(f"{error}; it is waited for")
            time.sleep(every)
        except OSError:
            return  # what was served last may do
        else:
            return


def describe(model: ServedModel) -> str:
    """A version in a line."""
    bits = "with the bits of its evaluation" if model.exact else f"not exactly as it was evaluated: {model.caveat}"
    return f"{model.name} version {model.version} ({model.scale or 'unknown scale'}), {bits},"


def _classes(model: ServedModel) -> list[str]:
    return list(model.about.get("class_names", []))
