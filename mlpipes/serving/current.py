"""Which version answers: an alias of MLflow's registry is followed, and a new version takes over between two batches."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlpipes.errors import ConfigError, CorruptionError, UserError
from mlpipes.serving.model import ServedModel, fetched, load
from mlpipes.store.files import quarantine, read_record, write_record
from mlpipes.store.layout import Store
from mlpipes.tracking.runs import Tracker

_OF_REGISTRY = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"})
"""What MLflow says where there is no such alias, or no such version."""


@dataclass(frozen=True)
class Wanted:
    """What is to be served."""

    name: str
    """Of the registered model."""
    version: str | None = None
    """A certain one; None: whichever the alias points to."""
    alias: str = "champion"

    def __str__(self) -> str:
        return f"models:/{self.name}/{self.version}" if self.version else f"models:/{self.name}@{self.alias}"


class Registry:
    """MLflow's registry, with what of it is kept in the store: a server starts and serves on while MLflow is away."""

    def __init__(self, connect: Callable[[], Tracker], wanted: Wanted, store: Store) -> None:
        self.connect, self.wanted, self.store = connect, wanted, store
        self.last = store.root / "served" / wanted.name / f"{wanted.version or wanted.alias}.json"
        """Where it is noted which folder was served last."""

    def version(self) -> str:
        """The version that is wanted now. Raises ConfigError if there is none, and OSError if MLflow does not answer."""
        from mlflow.exceptions import MlflowException

        wanted = self.wanted
        try:
            client = self.connect().client
        except ConfigError as error:
            raise OSError(str(error)) from error
        try:
            if wanted.version is not None:
                return str(client.get_model_version(wanted.name, wanted.version).version)
            return str(client.get_model_version_by_alias(wanted.name, wanted.alias).version)
        except MlflowException as error:
            if error.error_code in _OF_REGISTRY:
                raise ConfigError(
                    f"{wanted} is not registered in MLflow. Materialize the workload's chain first (`mlpipes demo`), or "
                    "name another --version or --alias"
                ) from error
            raise OSError(f"MLflow does not answer: {error}") from error

    def get(self, version: str) -> ServedModel:
        """A version, loaded and tried. Raises UserError where it cannot be served."""
        folder = fetched(self.connect(), self.wanted.name, version, self.store)
        try:
            model = load(folder)
        except CorruptionError:
            quarantine(folder)  # and once more from the registry
            folder = fetched(self.connect(), self.wanted.name, version, self.store)
            model = load(folder)
        write_record(self.last, {"folder": folder.name})
        return model

    def kept(self, why: OSError) -> ServedModel:
        """What was served last. Raises UserError where nothing was, with why it is asked for, or where it has changed."""
        try:
            folder = Path(self.last.parent / read_record(self.last)["folder"])
        except (FileNotFoundError, KeyError):
            raise ConfigError(f"{why}. Also, {self.wanted} was never served from this home") from why
        return load(folder)


class Current:
    """The model that answers now; `follow` keeps it the one that is wanted."""

    def __init__(self, registry: Registry, tell: Callable[[str], None], swapped: Callable[[ServedModel], None]) -> None:
        self.registry, self.tell, self.swapped = registry, tell, swapped
        self.model: ServedModel | None = None
        self.refused: dict[str, str] = {}
        """Versions that are not served, and why; they are tried again when another was wanted in between."""
        self._away = False

    async def start(self) -> None:
        """Load the first. Raises UserError if there is none."""
        began = time.monotonic()
        try:
            self._take(await asyncio.to_thread(lambda: self.registry.get(self.registry.version())))
        except OSError as error:
            self._away = True
            self._take(await asyncio.to_thread(self.registry.kept, error))
            self.tell(f"{error}; serving what was served last")
        assert self.model is not None  # noqa: S101 - just taken
        self.tell(f"{describe(self.model)} is served, after {time.monotonic() - began:.1f} s")

    async def follow(self, every: float, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """Look every so many seconds which version is wanted, and change to it; never ends by itself."""
        while True:
            await sleep(every)
            with suppress(asyncio.TimeoutError):
                await self.look()

    async def look(self) -> None:
        """Change to the version that is wanted, if it is another one and can be served."""
        assert self.model is not None  # noqa: S101 - started
        try:
            version = await asyncio.to_thread(self.registry.version)
        except (OSError, UserError) as error:
            if not self._away:
                self.tell(f"{error}; version {self.model.version} is served on")
            self._away = True
            return
        if self._away:
            self._away = False
            self.tell("MLflow answers again")
        if version == self.model.version:
            self.refused.clear()
            return
        if version in self.refused:
            return
        try:
            found = await asyncio.to_thread(self.registry.get, version)
            if found.signature != self.model.signature or _classes(found) != _classes(self.model):
                raise ConfigError(
                    "it takes or answers something else than the version that is served, which clients would notice: "
                    "start the server again to serve it"
                )
        except Exception as error:  # whatever is wrong with it, who serves now serves on
            self.refused = {version: str(error)}
            self.tell(f"version {version} is not served, and version {self.model.version} is served on: {error}")
            return
        before = self.model.version
        self._take(found)
        self.tell(f"{describe(found)} is served, instead of version {before}")

    def _take(self, model: ServedModel) -> None:
        self.model = model
        self.refused.clear()
        self.swapped(model)


def describe(model: ServedModel) -> str:
    """A version in a line."""
    bits = "with the bits of its evaluation" if model.exact else f"not exactly as it was evaluated: {model.caveat}"
    return f"{model.name} version {model.version} ({model.scale or 'unknown scale'}), {bits},"


def _classes(model: ServedModel) -> list[str]:
    return list(model.about.get("class_names", []))
