"""Who gets the canary, when it answers nobody any more, and what is compared afterwards; no server, no MLflow."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from mlpipes.errors import ConfigError
from mlpipes.serving.batcher import Batcher
from mlpipes.serving.current import Current
from mlpipes.serving.metrics import Metrics
from mlpipes.serving.model import RefusedError, ServedModel
from mlpipes.serving.shadow import Shadow, differences
from mlpipes.serving.traffic import Answered, Canary, NotFiniteError, Traffic
from mlpipes.workloads.golden import Values
from mlpipes_tests.serving.fakes import Fake, served
from mlpipes_tests.waiting import LIMIT_SECONDS

CLIENTS = [f"client {number}" for number in range(2000)]
SAMPLES = np.array([[1], [2], [3]])


def failing(values: Values) -> Values:
    raise ValueError("cannot")


def not_finite(values: Values) -> Values:
    return np.full((len(values), 1), np.nan)


class Scene:
    """A server's versions on two fake registries: version 1 is served, version 2 is the canary."""

    def __init__(self, share: float = 0.25, **canary: Any) -> None:
        self.registry, self.beside, self.said = Fake(), Fake(), []
        self.beside.now, self.beside.models["2"] = "2", served("2", **canary)
        self.metrics = Metrics()
        self.current = Current(self.registry, self.said.append, self.metrics.swapped)  # type: ignore[arg-type]
        self.canary = Canary(self.beside, self.current, self.said.append)  # type: ignore[arg-type]
        self.traffic = Traffic(self.current, self.canary, share, self.said.append, self.metrics)
        asyncio.run(self.current.start())
        self.look()

    def look(self, canary: Any = None) -> str:
        """Look at both once; which version is the canary."""
        if canary is not None:
            self.beside.now = canary
        asyncio.run(self.current.look(0.0))
        asyncio.run(self.canary.look(0.0))
        return self.traffic.canary.version if self.traffic.canary else ""

    def version_for(self, client: str) -> str:
        model = self.traffic.model_for(client)
        assert model is not None
        return model.version

    def with_batcher(self, scenario: Callable[[Batcher], Awaitable[Any]]) -> Any:
        async def whole() -> Any:
            batcher = Batcher()
            try:
                return await scenario(batcher)
            finally:
                await batcher.close()

        return asyncio.run(whole())

    def ask(self, client: str) -> str:
        """Have a client answered; by which version."""
        model = self.traffic.model_for(client)
        assert model is not None
        answering, answer = self.with_batcher(lambda batcher: self.traffic.answer(batcher, model, SAMPLES))
        assert np.array_equal(answer, SAMPLES)
        return answering.version

    def figure(self, name: str, **labels: str) -> float | None:
        registry: CollectorRegistry = self.metrics.registry
        return registry.get_sample_value(f"mlpipes_serve_{name}", labels)


def test_a_share_of_clients_gets_the_canary_and_each_always_the_same_version() -> None:
    scene = Scene(share=0.25)
    given = {client: scene.version_for(client) for client in CLIENTS}
    assert 0.2 < list(given.values()).count("2") / len(CLIENTS) < 0.3
    assert {client: scene.version_for(client) for client in CLIENTS} == given
    more = Scene(share=0.5)
    assert all(more.version_for(client) == "2" for client, version in given.items() if version == "2"), "they keep it"
    assert {Scene(share=1.0).version_for(client) for client in CLIENTS} == {"2"}
    assert {Scene(share=0.0).version_for(client) for client in CLIENTS} == {"1"}
    assert scene.figure("canary_share") == 0.25


def test_another_canary_is_tried_on_other_clients() -> None:
    scene = Scene(share=0.25)
    first = {client for client in CLIENTS if scene.version_for(client) == "2"}
    assert scene.look("3") == "3"
    assert {client for client in CLIENTS if scene.version_for(client) == "3"} != first


@pytest.mark.parametrize("run", [failing, not_finite, lambda values: values[:1]])
def test_a_canary_that_fails_answers_nobody_any_more_and_no_request_fails_for_it(run: Any) -> None:
    scene = Scene(share=1.0, run=run)
    assert [scene.ask("somebody") for _ in range(3)] == ["1"] * 3
    assert (scene.traffic.share, scene.figure("canary_share")) == (0.0, 0.0)
    assert scene.figure("rollbacks_total", version="2") == 1
    assert len([text for text in scene.said if "has failed where version 1 has not" in text]) == 1
    assert {scene.version_for(client) for client in CLIENTS} == {"1"}
    assert scene.look() == "2"
    assert scene.traffic.share == 0.0, "for good"
    assert scene.look("3") == "3"
    assert scene.ask("somebody") == "3", "another one is tried"


@pytest.mark.parametrize(("run", "error"), [(failing, ValueError), (not_finite, NotFiniteError)])
def test_samples_that_no_version_can_answer_are_no_reason(run: Any, error: type[Exception]) -> None:
    scene = Scene(share=1.0, run=run)
    scene.registry.models["3"], scene.registry.now = served("3", run=run), "3"
    scene.look()
    with pytest.raises(error):
        scene.ask("somebody")
    assert scene.traffic.share == 1.0


@pytest.mark.parametrize(
    ("why", "says"),
    [
        (RefusedError("its golden request"), "its golden request"),
        (served("3", about={"class_names": ["b"]}), "takes or answers something else"),
        (served("3", signature=None), "takes or answers something else"),
    ],
)
def test_a_canary_that_cannot_be_one_is_refused_and_the_one_before_answers_nobody(why: Any, says: str) -> None:
    scene = Scene()
    scene.beside.models["3"] = why
    assert [scene.look("3") for _ in range(3)] == [""] * 3
    assert (scene.figure("canary_share"), scene.version_for("anybody")) == (0.0, "1")
    (text,) = [text for text in scene.said if "version 3 is not served, and there is no canary" in text]
    assert says in text


def test_the_alias_of_the_canary_comes_goes_and_becomes_champion() -> None:
    scene = Scene(share=1.0)
    assert scene.look(ConfigError("is not registered")) == ""
    assert scene.version_for("anybody") == "1"
    assert scene.look("2") == "2"
    assert scene.look(OSError("MLflow does not answer")) == "2", "it may come back"
    scene.registry.now = "2"
    assert scene.look("2") == "", "it is what is served"
    assert [model.version for model in scene.traffic.versions] == ["2"]


def shadowing(scene: Scene, answered: Answered, counted: Callable[[], Any], share: float = 1.0) -> None:
    """Offer an answered request to the shadow, and wait until something is counted."""

    async def scenario(batcher: Batcher) -> None:
        shadow = Shadow(scene.traffic, batcher, scene.metrics, share)
        shadow.offer(answered, lambda: 0.5)
        async with asyncio.timeout(LIMIT_SECONDS):
            while not counted():
                await asyncio.sleep(0)
        await shadow.close()

    scene.with_batcher(scenario)


def answered_by(model: ServedModel | None, answer: Values = SAMPLES) -> Answered:
    assert model is not None
    return Answered(model, SAMPLES, answer, 10)


LOGITS = np.array([[5.0, 1.0], [5.0, 1.0], [1.0, 5.0]])
NAMES: dict[str, Any] = {"about": {"class_names": ["a", "b"]}}


def test_what_the_other_version_says_is_compared_by_class_and_by_number() -> None:
    scene = Scene(run=lambda values: LOGITS[:, ::-1] if len(values) == 2 else LOGITS + 0.5)
    one, two = (served(version, run=lambda values: LOGITS + 0.5, **NAMES) for version in "12")
    scene.current.model, scene.canary.model = one, two
    shadowing(scene, answered_by(one, LOGITS), lambda: scene.figure("shadow_difference_count"))
    assert scene.figure("shadow_samples_total", canary="2", agree="true") == 3
    assert scene.figure("shadow_difference_sum") == 1.5
    shadowing(
        scene, answered_by(two, LOGITS[::-1]), lambda: scene.figure("shadow_samples_total", canary="2", agree="false")
    )
    assert scene.figure("shadow_samples_total", canary="2", agree="false") == 2
    assert scene.figure("shadow_samples_total", canary="2", agree="true") == 4


def test_a_canary_that_fails_in_the_shadow_answers_nobody_any_more() -> None:
    scene = Scene(share=0.1, run=failing)
    shadowing(scene, answered_by(scene.current.model), lambda: scene.figure("shadow_failed_total", version="2"))
    assert scene.traffic.share == 0.0
    assert scene.figure("rollbacks_total", version="2") == 1


def test_nothing_is_computed_beside_a_single_version_or_beyond_the_share() -> None:
    computed: list[int] = []
    scene = Scene(run=lambda values: computed.append(len(values)) or values)

    async def scenario(batcher: Batcher) -> None:
        shadow = Shadow(scene.traffic, batcher, scene.metrics, 0.5)
        shadow.offer(answered_by(scene.current.model), lambda: 0.5)
        scene.canary.model = None
        shadow.offer(answered_by(scene.current.model), lambda: 0.0)
        for _ in range(10):
            await asyncio.sleep(0)
        await shadow.close()

    scene.with_batcher(scenario)
    assert computed == []
    assert scene.figure("shadow_dropped_total") == 0


def test_shadows_wait_until_nobody_waits_for_an_answer_and_too_many_are_dropped() -> None:
    order: list[tuple[str, int]] = []
    gate, entered = threading.Event(), threading.Event()

    def one(values: Values) -> Values:
        entered.set()
        assert gate.wait(LIMIT_SECONDS)
        order.append(("answer", len(values)))
        return values

    def two(values: Values) -> Values:
        order.append(("shadow", len(values)))
        return values

    scene = Scene(run=two)
    scene.current.model = model = served("1", run=one)
    many = np.arange(20)[:, None]

    async def scenario(batcher: Batcher) -> None:
        shadow = Shadow(scene.traffic, batcher, scene.metrics, 1.0)
        first = asyncio.ensure_future(batcher(model, SAMPLES))
        await asyncio.to_thread(entered.wait, LIMIT_SECONDS)
        shadow.offer(Answered(model, many, many, 17 << 20))  # larger than what may wait, but nothing does
        for _ in range(3):
            shadow.offer(Answered(model, many, many, 1))
        second = asyncio.ensure_future(batcher(model, SAMPLES))
        await asyncio.sleep(0)
        assert order == []
        gate.set()
        await asyncio.gather(first, second)
        async with asyncio.timeout(LIMIT_SECONDS):
            while scene.figure("shadow_difference_count") != 20:
                await asyncio.sleep(0)
        await shadow.close()

    try:
        scene.with_batcher(scenario)
    finally:
        gate.set()
    assert order == [("answer", 3), ("answer", 3), ("shadow", 8), ("shadow", 8), ("shadow", 4)]
    assert scene.figure("shadow_dropped_total") == 3


def test_differences_are_of_what_both_answers_have_as_numbers() -> None:
    one = {"label": np.array(["a", "b"], dtype=object), "p(a)": np.array([0.9, 0.2]), "p(b)": np.array([0.1, 0.8])}
    other = one | {"p(a)": np.array([0.5, 0.2]), "p(b)": np.array([0.4, 0.8])}
    assert differences(one, other) == pytest.approx([0.4, 0.0])
    assert differences(np.zeros((2, 3)), np.zeros((2, 4))) == []
    assert differences(np.zeros(2, np.uint8), np.array([255, 1], np.uint8)) == [255, 1]
