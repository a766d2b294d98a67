"""The queue in front of a model: company, order, limits, failures; models in here wait until they are let go."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mlpipes.serving.batcher import AT_ONCE, MOST_WAITING, Batcher, FullError
from mlpipes.serving.model import ServedModel
from mlpipes.serving.signature import Column, Signature
from mlpipes.workloads.golden import Values
from mlpipes_tests.waiting import LIMIT_SECONDS


class Gate:
    """A model that answers with its input and its own name, once it is let go; remembers what it got together."""

    def __init__(self) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        self.got: list[int] = []

    def __call__(self, values: Values) -> Values:
        self.entered.set()
        assert self.open.wait(LIMIT_SECONDS)
        self.got.append(len(values))
        if any(row[0] == 99 for row in np.asarray(values)):
            raise ValueError("ninety-nine")
        return np.asarray(values) * 2


def model(run: Callable[[Values], Values], *, shares: bool = True, free: bool = False) -> ServedModel:
    columns = (Column("", "int64", (-1 if free else 1,)),)
    signature = Signature(columns, columns, is_tensor=True, answers_tensor=True)
    return ServedModel("m", "1", "s", "w", "f", signature, True, "", shares, {}, run)


def rows(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)[:, None]


async def gathered(batcher: Batcher, gate: Gate, *asked: tuple[ServedModel, np.ndarray]) -> list[Any]:
    """Answers to requests that all wait before the first is let go."""
    tasks = []
    for number, (served, values) in enumerate(asked):
        tasks.append(asyncio.ensure_future(batcher(served, values)))
        await asyncio.sleep(0)
        if number == 0:
            await asyncio.to_thread(gate.entered.wait, LIMIT_SECONDS)
    gate.open.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


def run(scenario: Callable[[Batcher, Gate], Any]) -> Gate:
    async def whole() -> Gate:
        batcher, gate = Batcher(), Gate()
        try:
            await scenario(batcher, gate)
        finally:
            gate.open.set()
            await batcher.close()
        return gate

    return asyncio.run(whole())


def test_what_waits_goes_together_and_each_gets_its_own() -> None:
    async def scenario(batcher: Batcher, gate: Gate) -> None:
        served = model(gate)
        answers = await gathered(batcher, gate, *((served, rows(n, n + 100)) for n in range(5)))
        assert [answer[:, 0].tolist() for answer in answers] == [[2 * n, 2 * n + 200] for n in range(5)]

    assert run(scenario).got == [2, 8]


@pytest.mark.parametrize("alone", [{"shares": False}, {"free": True}])
def test_a_model_whose_answers_depend_on_the_company_gets_each_request_alone(alone: dict[str, bool]) -> None:
    async def scenario(batcher: Batcher, gate: Gate) -> None:
        served = model(gate, **alone)
        await gathered(batcher, gate, *((served, rows(n)) for n in range(4)))

    assert run(scenario).got == [1, 1, 1, 1]


def test_no_request_is_answered_by_another_version_than_the_one_that_checked_it() -> None:
    async def scenario(batcher: Batcher, gate: Gate) -> None:
        old, new = model(gate), model(gate)
        await gathered(batcher, gate, (old, rows(1)), (old, rows(2)), (new, rows(3)), (new, rows(4)), (old, rows(5)))

    assert run(scenario).got == [1, 1, 2, 1]


def test_at_most_so_many_go_together_and_beyond_the_queue_requests_are_refused() -> None:
    async def scenario(batcher: Batcher, gate: Gate) -> None:
        served, whole = model(gate), rows(*range(AT_ONCE))
        full = [(served, whole)] * (MOST_WAITING // AT_ONCE)
        answers = await gathered(batcher, gate, *full, (served, rows(7)))
        assert isinstance(answers[-1], FullError)
        assert not any(isinstance(answer, Exception) for answer in answers[:-1])
        assert len(await batcher(served, rows(7))) == 1, "and later there is room again"

    assert max(run(scenario).got) == AT_ONCE


def test_a_failure_is_told_to_whom_it_concerns_and_the_next_is_answered() -> None:
    async def scenario(batcher: Batcher, gate: Gate) -> None:
        served = model(gate)
        answers = await gathered(batcher, gate, (served, rows(1)), (served, rows(99)), (served, rows(2)))
        assert [answer.tolist() for answer in answers[::2]] == [[[2]], [[4]]], "what was asked beside it is answered"
        assert isinstance(answers[1], ValueError)
        assert (await batcher(served, rows(3))).tolist() == [[6]]  # type: ignore[union-attr]

    run(scenario)


def test_models_compute_one_at_a_time_for_kernels_are_chosen_for_the_whole_process() -> None:
    inside, most = [0], [0]

    def compute(values: Values) -> Values:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        inside[0] -= 1
        return values

    threads = [threading.Thread(target=model(compute), args=(rows(1),)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_who_has_gone_is_not_computed() -> None:
    async def scenario(batcher: Batcher, gate: Gate) -> None:
        served = model(gate)
        first = asyncio.ensure_future(batcher(served, rows(1)))
        await asyncio.to_thread(gate.entered.wait, LIMIT_SECONDS)
        gone, stays = (asyncio.ensure_future(batcher(served, rows(n))) for n in (2, 3))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        gate.open.set()
        assert (await first).tolist() == [[2]]  # type: ignore[union-attr]
        assert (await stays).tolist() == [[6]]  # type: ignore[union-attr]

    assert run(scenario).got == [1, 1]
