"""A registry and models that say what a test wants them to say: no MLflow, no torch; no test is in here."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np

from mlpipes.serving.model import Registered, ServedModel
from mlpipes.serving.sampled import Sampler
from mlpipes.serving.signature import Column, Signature
from mlpipes.serving.traffic import Answered
from mlpipes.store.layout import Store
from mlpipes.workloads.golden import Values

SIGNATURE = Signature((Column("", "int64", (1,)),), (Column("", "int64", (1,)),), is_tensor=True, answers_tensor=True)


def same(values: Values) -> Values:
    return np.asarray(values)


def served(version: str, **changes: Any) -> ServedModel:
    found = ServedModel("m", version, "s", "w", "f", SIGNATURE, True, "", True, {"class_names": ["a"]}, same)
    return replace(found, **changes)


class Fake:
    """A registry that says what a test wants it to say: a version, an error, or a model."""

    wanted = "models:/m@champion"

    def __init__(self) -> None:
        self.now: Any = "1"
        self.models: dict[str, Any] = {version: served(version) for version in "123"}
        self.asked: list[str] = []

    def wanted_now(self) -> Registered:
        if isinstance(self.now, Exception):
            raise self.now
        return self.now if isinstance(self.now, Registered) else Registered("m", self.now, f"source {self.now}", {})

    def get(self, registered: Registered) -> ServedModel:
        self.asked.append(registered.version)
        found = self.models[registered.version]
        if isinstance(found, Exception):
            raise found
        return found

    def kept(self, why: OSError) -> ServedModel:
        return served("1")


def keep_served(store: Store, model: ServedModel, values: Values) -> None:
    """Answer samples as a server does, which keeps of them what it keeps."""

    async def scenario() -> None:
        dropped: list[int] = []
        sampler = Sampler(store, 1000, lambda: dropped.append(1))
        sampler.offer(Answered(model, values, model(values), 1))
        while sampler._later._queue:
            await asyncio.sleep(0)
        await sampler.close()
        assert not dropped

    asyncio.run(scenario())
