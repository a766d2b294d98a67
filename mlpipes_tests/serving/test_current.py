"""Which version answers: what is refused for good, what is tried again, and what is said of it; no server, no MLflow."""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest

from mlpipes.errors import ConfigError
from mlpipes.serving.current import Current, await_first
from mlpipes.serving.model import RefusedError, Registered
from mlpipes_tests.serving.fakes import Fake, served


class Scene:
    """A server's `Current` on a fake registry."""

    def __init__(self) -> None:
        self.registry, self.said, self.swaps = Fake(), [], []
        self.current = Current(self.registry, self.said.append, lambda model: self.swaps.append(model.version))  # type: ignore[arg-type]
        self.run(self.current.start())

    def run(self, what: Any) -> None:
        asyncio.run(what)

    def look(self, now: Any = None, every: float = 0.0) -> str:
        """Look once, and say which version is served."""
        if now is not None:
            self.registry.now = now
        self.run(self.current.look(every))
        assert self.current.model is not None
        return self.current.model.version


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_the_alias_is_followed_there_and_back(scene: Scene) -> None:
    assert [scene.look(version) for version in "1223211"] == list("1223211")
    assert scene.swaps == list("123 2 1".replace(" ", ""))
    assert "is served, instead of version 2" in scene.said[-1]


@pytest.mark.parametrize(
    "why", [RefusedError("its golden request"), served("2", about={"class_names": ["b"]}), served("2", signature=None)]
)
def test_what_is_wrong_with_a_version_is_said_once_and_it_is_not_tried_again(scene: Scene, why: Any) -> None:
    scene.registry.models["2"] = why
    assert [scene.look("2") for _ in range(4)] == ["1"] * 4
    assert scene.registry.asked == ["1", "2"]
    assert len([text for text in scene.said if "version 2 is not served" in text]) == 1
    assert scene.look("3") == "3"


def test_what_cannot_be_had_now_is_tried_again_at_growing_intervals_and_said_once(scene: Scene) -> None:
    scene.registry.models["2"] = ConfigError("the disk is full")
    assert [scene.look("2") for _ in range(3)] == ["1"] * 3
    assert scene.registry.asked == ["1", "2", "2", "2"]
    assert len([text for text in scene.said if "the disk is full; it is tried again" in text]) == 1
    scene.registry.models["2"] = served("2")
    assert scene.look() == "2"
    scene.registry.models["3"] = RuntimeError("something else")
    assert [scene.look("3", every=3600.0) for _ in range(3)] == ["2"] * 3
    assert scene.registry.asked[-2:] == ["2", "3"], "not before its time has come"


def test_a_registry_that_is_away_or_has_lost_the_alias_is_said_once_and_so_is_its_return(scene: Scene) -> None:
    for error in (OSError("MLflow does not answer"), ConfigError("is not registered")):
        before = len(scene.said)
        assert [scene.look(error) for _ in range(3)] == ["1"] * 3
        assert scene.look("1") == "1"
        said = scene.said[before:]
        assert len(said) == 2
        assert str(error) in said[0]
        assert "is found again" in said[1]


@pytest.mark.parametrize("ends", [None, OSError("MLflow does not answer, and what was kept may do")])
def test_the_first_version_is_waited_for_and_what_is_missing_is_said_once(ends: Any) -> None:
    class Empty(Fake):
        looks = 0

        def wanted_now(self) -> Registered:
            self.looks += 1
            self.now = ends or "1" if self.looks > 3 else ConfigError("is not registered")
            return super().wanted_now()

    source, said = Empty(), []
    await_first(source, said.append, 0.0)  # type: ignore[arg-type]
    assert source.looks == 4
    assert said == ["is not registered; it is waited for"]


def test_another_model_under_the_same_number_takes_over(scene: Scene) -> None:
    scene.look("1")
    scene.registry.models["1"] = served("1", weights="others")
    assert scene.look(Registered("m", "1", "a registry made anew", {})) == "1"
    assert scene.current.model is not None
    assert scene.current.model.weights == "others"


def test_what_was_kept_serves_until_the_registry_is_back() -> None:
    scene = Scene.__new__(Scene)
    scene.registry, scene.said, scene.swaps = Fake(), [], []
    scene.current = Current(scene.registry, scene.said.append, lambda model: scene.swaps.append(model.version))  # type: ignore[arg-type]
    scene.registry.now = OSError("MLflow does not answer")
    scene.run(scene.current.start())
    assert "serving what was served last" in scene.said[0]
    assert scene.look("1") == "1"
    assert scene.registry.asked == []
    assert scene.look("2") == "2"


def test_a_store_cannot_be_without_the_files_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    from mlpipes.serving.model import fetched
    from mlpipes.store.layout import Store

    def empty(artifact_uri: str, dst_path: str) -> str:
        (Path(dst_path) / "nothing").mkdir()
        return str(Path(dst_path) / "nothing")

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", empty)
    tracker: Any = type("Tracker", (), {"uri": f"sqlite:///{tmp_path}/m.db"})()
    with pytest.raises(ConfigError, match=r"the files of m version 1 are not in MLflow's artifacts; materialize"):
        fetched(tracker, Registered("m", "1", "somewhere", {}), Store(tmp_path))
    assert not list((tmp_path / "served").glob("*/1-*"))


def test_versions_that_nobody_has_loaded_for_long_are_removed_from_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    from mlpipes.serving.model import fetched
    from mlpipes.store.layout import Store

    def download(artifact_uri: str, dst_path: str) -> str:
        (Path(dst_path) / "it").mkdir()
        (Path(dst_path) / "it" / "MLmodel").write_text(artifact_uri)
        return str(Path(dst_path) / "it")

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", download)
    tracker: Any = type("Tracker", (), {"uri": f"sqlite:///{tmp_path}/m.db"})()

    def fetch(number: int) -> Path:
        return fetched(tracker, Registered("m", str(number), "somewhere", {}), Store(tmp_path))

    folders, now = [fetch(number) for number in range(6)], time.time()
    for number, folder in enumerate(folders):  # the sixth was loaded last
        os.utime(folder, (now, now - (10 - number) * 86400))
    os.utime(folders[0], (now, now - 3600))
    newest = fetch(7)
    left = {path.name for path in (tmp_path / "served" / "m").iterdir()}
    assert left == {newest.name, folders[0].name, folders[4].name, folders[5].name}, "the last four, of whatever age"
