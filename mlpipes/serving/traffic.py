"""Which version answers whom: a second one, the canary, answers a share of the clients for as long as it does not fail."""

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from mlpipes.serving.batcher import Batcher, FullError
from mlpipes.serving.current import Current, Source, describe
from mlpipes.serving.metrics import Metrics
from mlpipes.serving.model import ServedModel
from mlpipes.serving.signature import is_finite
from mlpipes.workloads.golden import Values


class NotFiniteError(Exception):
    """An answer has numbers that JSON does not have."""


@dataclass(frozen=True)
class Answered:
    """A request that was answered."""

    model: ServedModel
    values: Values
    """The samples, as the model got them."""
    answer: Values
    size: int
    """Bytes of its body."""


class Canary(Current):
    """A version beside the one that is served. There need not be one, and where there is none, all goes on."""

    def __init__(self, registry: Source, current: Current, tell: Callable[[str], None]) -> None:
        super().__init__(registry, tell, lambda model: None)
        self.current = current

    def _served(self) -> ServedModel:
        return self.current._served()

    def _do_without(self) -> None:
        self.model = self._registered = None

    def _meanwhile(self) -> str:
        return f"version {self.model.version} stays the canary" if self.model else "there is no canary"

    def _change(self, found: ServedModel, before: ServedModel | None) -> str:
        return f"{describe(found)} is the canary" + (f", instead of version {before.version}" if before else "")


class Traffic:
    """The versions of one server, and who gets which."""

    def __init__(
        self, current: Current, canary: Canary | None, share: float, tell: Callable[[str], None], metrics: Metrics
    ) -> None:
        self.current, self._canary, self._share, self._tell, self._metrics = current, canary, share, tell, metrics
        self._failed: ServedModel | None = None
        metrics.share.set_function(lambda: self.share)

    async def follow(self, every: float) -> None:
        """Look every so many seconds which versions are wanted, and change to them; never ends by itself."""
        while True:
            await asyncio.sleep(every)
            for each in filter(None, (self.current, self._canary)):
                try:
                    await each.look(every)
                except Exception as error:  # whatever it is, who serves now serves on
                    self._tell(f"the registry could not be looked at: {type(error).__name__}: {error}")

    @property
    def canary(self) -> ServedModel | None:
        """The other version, where there is one that differs from the one that is served."""
        found, served = self._canary.model if self._canary else None, self.current.model
        if found is None or served is None or (found.version, found.weights) == (served.version, served.weights):
            return None
        return found

    @property
    def share(self) -> float:
        """Of clients that the canary answers now."""
        return self._share if self.canary is not None and self.canary is not self._failed else 0.0

    @property
    def versions(self) -> list[ServedModel]:
        """All that are here, the one that is served first."""
        return [model for model in (self.current.model, self.canary) if model is not None]

    def version(self, version: str | None) -> ServedModel | None:
        """A certain version (None: the one that is served), if it is here."""
        return next((model for model in self.versions if version in (None, model.version)), None)

    def model_for(self, client: str) -> ServedModel | None:
        """The model that answers a client: always the same one, while the canary is the same and does not fail."""
        canary = self.canary
        if canary is None or not self.share:
            return self.current.model
        # With the version: otherwise, every canary would be tried on the same clients.
        place = hashlib.sha256(f"{canary.version}/{client}".encode()).digest()[:8]
        return canary if int.from_bytes(place) < self.share * 2**64 else self.current.model

    def other(self, model: ServedModel) -> ServedModel | None:
        """The version beside one that has answered, if there is one."""
        others = [each for each in self.versions if each is not model]
        return others[0] if len(others) == 1 else None

    async def answer(self, batcher: Batcher, model: ServedModel, values: Values) -> tuple[ServedModel, Values]:
        """A model's answer to checked samples; where a canary fails, that of the version beside it.

        Raises FullError, NotFiniteError, or what the model raises.
        """
        try:
            return model, await computed(batcher, model, values)
        except FullError:
            raise
        except Exception as error:
            served = self.current.model
            if served is None or model is served:
                raise
            answer = await computed(batcher, served, values)  # if it fails as well, it was for the samples
            self.fail(model, error)
            return served, answer

    def fail(self, model: ServedModel, error: Exception) -> None:
        """A version has failed where the other one has not; if it is the canary, it answers nobody any more."""
        if model is not self.canary or model is self._failed:
            return
        self._failed = model
        self._metrics.rollbacks.labels(model.version).inc()
        self._tell(
            f"the canary, version {model.version}, has failed where version {self._served_version()} has not, and answers "
            f"nobody any more: {type(error).__name__}: {error}"
        )

    def _served_version(self) -> str:
        return self.current.model.version if self.current.model else "?"


async def computed(batcher: Batcher, model: ServedModel, values: Values) -> Values:
    """A model's answer that can be written as JSON. Raises NotFiniteError, FullError, or what the model raises."""
    answer = await batcher(model, values)
    if not is_finite(answer):
        raise NotFiniteError("the answer has numbers that JSON does not have")
    return answer
