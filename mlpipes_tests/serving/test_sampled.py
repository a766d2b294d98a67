"""The sample of what was served: what of it is kept, how much, how fairly, and what a crash leaves; no server, no MLflow."""

import asyncio
import json
import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mlpipes.serving import sampled
from mlpipes.serving.sampled import Reservoir, Sampler, folder_of, served_since
from mlpipes.serving.summaries import LABEL, summarized
from mlpipes.serving.traffic import Answered
from mlpipes.store.layout import Store
from mlpipes_tests.serving.fakes import served
from mlpipes_tests.waiting import LIMIT_SECONDS

NOON = datetime(2026, 11, 27, 12, 5, tzinfo=UTC)
MODEL = served("7", weights="a" * 64)


class Clock:
    """What time it is."""

    def __init__(self) -> None:
        self.time = NOON

    def __call__(self) -> datetime:
        return self.time


class Scene:
    """A sampler in a store, to which requests are offered."""

    def __init__(self, store: Path, size: int = 10) -> None:
        self.store, self.size, self.clock, self.dropped = Store(store), size, Clock(), []

    @property
    def folder(self) -> Path:
        return folder_of(self.store, MODEL.name, MODEL.version, MODEL.weights)

    def files(self) -> list[str]:
        return sorted(path.name.partition("-")[0] for path in self.folder.glob("*"))

    def serve(self, *hours: Any) -> None:
        """One server, which answers so many requests in one hour after the other, each with that hour as its sample."""

        async def scenario() -> None:
            sampler = Sampler(self.store, self.size, lambda: self.dropped.append(1), self.clock)
            for count in hours:
                values = np.full((1, 1), self.clock.time.hour)
                for _ in range(count):
                    sampler.offer(Answered(MODEL, values, values, 1))
                    await asyncio.sleep(0)
                async with asyncio.timeout(LIMIT_SECONDS):
                    while sampler._later._queue:
                        await asyncio.sleep(0)
                await sampler.write()
                self.clock.time += timedelta(hours=1)
            await sampler.close()

        asyncio.run(scenario())

    def found(self, hours: int = 24) -> sampled.Sample:
        return served_since(self.folder, self.clock.time - timedelta(hours=hours))


def test_each_sample_is_kept_with_the_same_chance() -> None:
    generator, counts = random.Random(1), Counter()  # noqa: S311
    for _ in range(2000):
        reservoir, kept = Reservoir(Path(), 5), {}
        for request in range(10):  # of three samples each
            kept |= {place: 3 * request + row for place, row in reservoir.places(3, generator).items()}
        assert reservoir.seen == 30
        assert len(kept) == 5
        counts.update(kept.values())
    assert len(counts) == 30
    assert stats.chisquare(list(counts.values())).pvalue > 0.001


def test_what_is_kept_of_an_hour_is_bounded_and_weighs_as_much_as_was_served(tmp_path: Path) -> None:
    scene = Scene(tmp_path, size=200)
    scene.serve(250, 100, 0, 50)
    assert scene.files() == ["20261127T12", "20261127T13", "20261127T15"]
    found = scene.found()
    assert found.seen == 400
    # 200 of the first 250 were kept: four of five are taken of all hours.
    assert Counter(found.columns["input mean"]) == {12: 200, 13: 80, 15: 40}
    assert scene.found(hours=2).n == 50
    assert scene.dropped == []


def test_two_servers_of_one_store_and_one_that_starts_again_write_files_of_their_own(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    for _ in range(3):
        scene.clock.time = NOON
        scene.serve(2)
    assert scene.files() == ["20261127T12"] * 3
    assert (scene.found().seen, scene.found().n) == (6, 6)


def test_files_that_are_old_or_too_many_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path)
    scene.serve(1)
    scene.clock.time = NOON + timedelta(hours=47)
    scene.serve(1)
    assert scene.files() == ["20261127T12", "20261129T11"]
    scene.serve(1)
    assert scene.files() == ["20261129T11", "20261129T12"]
    monkeypatch.setattr(sampled, "_MOST_FILES", 3)
    scene.serve(1, 1, 1)
    assert scene.files() == ["20261129T13", "20261129T14", "20261129T15"]


def test_a_file_that_is_broken_or_of_other_figures_is_left_out(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.serve(3, 4)
    first, second = sorted(scene.folder.glob("*.json"))
    content = json.loads(second.read_text())
    assert not (set(content["content"]["columns"]) - set(summarized(MODEL, np.ones((1, 1)), np.ones((1, 1)))))
    second.write_text(second.read_text()[:100])
    assert scene.found().n == 3
    second.write_text("[" * 100_000)
    (scene.folder / "9.json").mkdir()
    (scene.folder / "8.json").symlink_to(scene.folder / "8.json")
    assert scene.found().n == 3
    first.write_text("")
    assert (scene.found().seen, scene.found().n) == (0, 0)
    assert served_since(tmp_path / "nothing", NOON).n == 0


def test_a_store_that_cannot_be_written_to_is_counted_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path)
    (tmp_path / "served_samples").write_text("a file where a folder should be")
    scene.serve(2)
    assert scene.dropped
    assert not scene.folder.exists()


IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 1, 3, 4)


def test_pictures_are_summarized_by_light_contrast_and_neighbours_and_answers_by_class() -> None:
    model = served("1", about={"class_names": ["a", "b"]})
    found = summarized(model, IMAGES, np.log(np.array([[0.75, 0.25], [0.1, 0.9]])))
    assert found["input mean"] == [5.5, 17.5]
    assert found["input deviation"] == pytest.approx([11.916666**0.5] * 2, rel=1e-5)
    assert (found["input least"], found["input greatest"]) == ([0, 12], [11, 23])
    assert found["input roughness"] == [1, 1]
    assert found[LABEL] == ["a", "b"]
    assert found["answer confidence"] == pytest.approx([0.75, 0.9])
    assert len(found) == 7


def test_texts_and_numbers_of_a_table_are_never_kept_as_they_are() -> None:
    texts = np.array(["Müller owes 12 €", "", "a b"], dtype=object)
    numbers = np.array([123456.0, -0.0123, 1e300])
    answer = {"label": np.array(["x", "y", "x"], dtype=object), "p(x)": np.array([0.9, 0.2, 0.5]), "p(y)": np.ones(3)}
    found = summarized(MODEL, {"text": texts, "age": numbers}, answer)
    assert found["input text: characters"] == [16, 1, 3]
    assert found["input text: words"] == [4, 0, 2]
    assert found["input text: letters"] == pytest.approx([10 / 16, 0, 2 / 3], rel=1e-4)
    assert found["input text: beyond ASCII"] == pytest.approx([2 / 16, 0, 0])
    assert found["input age"] == [120_000, -0.012, 1e30]
    assert (found[LABEL], found["answer confidence"]) == (["x", "y", "x"], [1, 1, 1])
    assert summarized(MODEL, np.array([[123456.0, 123456.0]]), np.zeros((1, 1)))["input mean"] == [120_000]
    assert "Müller" not in json.dumps(found, ensure_ascii=False)


def test_answers_that_are_no_classes_are_summarized_by_their_numbers() -> None:
    assert summarized(MODEL, IMAGES, np.array([[1.0, 3.0], [np.nan, np.inf]]))["answer mean"] == [2, 0]
    assert summarized(MODEL, IMAGES, {"value": np.array([1.5, 2.5])})["answer value"] == [1.5, 2.5]
