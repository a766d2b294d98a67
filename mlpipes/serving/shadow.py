"""Shadowing: what the other version would have answered, computed when nobody waits for an answer, and compared."""

import random
from collections.abc import Callable

import numpy as np

from mlpipes.serving.batcher import Batcher
from mlpipes.serving.later import Later
from mlpipes.serving.metrics import Metrics
from mlpipes.serving.model import ServedModel
from mlpipes.serving.signature import cut, joined, rows_of
from mlpipes.serving.summaries import classes_in
from mlpipes.serving.traffic import Answered, Traffic, computed
from mlpipes.workloads.golden import Values

_AT_ONCE = 8
"""Samples that the other version is given in one go: one pass, which is how long a request that comes then waits."""


class Shadow:
    """Has a share of the answered requests answered by the other version as well."""

    def __init__(self, traffic: Traffic, batcher: Batcher, metrics: Metrics, share: float) -> None:
        self._traffic, self._batcher, self._metrics, self._share = traffic, batcher, metrics, share
        self._later = Later(self._compare, metrics.shadow_dropped.inc)

    def offer(self, answered: Answered, chance: Callable[[], float] = random.random) -> None:
        """Compare a request's answer later, if there is a version to compare with, and time."""
        if self._traffic.other(answered.model) is not None and chance() < self._share:
            self._later.offer(answered, answered.size)

    async def close(self) -> None:
        """Compare no more."""
        await self._later.close()

    async def _compare(self, answered: Answered) -> None:
        other, canary = self._traffic.other(answered.model), self._traffic.canary
        if other is None or canary is None:  # it has gone since
            return
        try:
            answer = await self._computed(other, answered.values)
        except Exception as error:
            self._metrics.shadow_failed.labels(other.version).inc()
            self._traffic.fail(other, error)
            return
        labels, others = classes_in(answered.model, answered.answer)[0], classes_in(other, answer)[0]
        for one, another in zip(labels, others, strict=True):
            self._metrics.shadowed.labels(canary.version, str(one == another).lower()).inc()
        for difference in differences(answered.answer, answer):
            self._metrics.difference.observe(difference)

    async def _computed(self, model: ServedModel, values: Values) -> Values:
        rows = rows_of(values)
        step = _AT_ONCE if model.shares else rows
        answers = []
        for start in range(0, rows, step):
            await self._batcher.when_idle()
            answers.append(await computed(self._batcher, model, cut(values, start, start + step)))
        return joined(answers)


def differences(one: Values, other: Values) -> list[float]:
    """The greatest absolute difference between two answers to each sample, of the numbers in them."""
    columns, others = _columns(one), _columns(other)
    found = [
        np.abs(np.asarray(column, np.float64) - np.asarray(others[name], np.float64)).reshape(len(column), -1).max(1)
        for name, column in columns.items()
        if name in others and np.shape(column) == np.shape(others[name])
    ]
    return np.max(found, axis=0).tolist() if found else []


def _columns(values: Values) -> dict[str, np.ndarray]:
    columns = {"": values} if isinstance(values, np.ndarray) else {n: np.asarray(c) for n, c in values.items()}
    return {name: column for name, column in columns.items() if column.dtype.kind in "fiub"}
