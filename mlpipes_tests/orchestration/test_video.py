"""The assets of videos: a file in the folder becomes an upscaled one; the sensor takes what has stopped growing."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from mlpipes.orchestration import video
from mlpipes.orchestration.folders import settled
from mlpipes.orchestration.resources import RayResource, StoreResource
from mlpipes.orchestration.video import GROUP, SUFFIXES, VIDEOS, priority_of, video_assets, video_job, video_sensor
from mlpipes.store.files import sha256_file
from mlpipes_tests.video.made import QUICK, upscale_here, write_video


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is watched."""
    folder = tmp_path / "videos"
    folder.mkdir()
    monkeypatch.setenv("MLPIPES_VIDEOS", str(folder))
    return folder


def tick(instance: dg.DagsterInstance, cursor: str | None = None) -> Any:
    """One look of the sensor."""
    definitions = dg.Definitions(assets=video_assets(), jobs=[video_job()], resources=resources())
    context = dg.build_sensor_context(instance, cursor=cursor, definitions=definitions)
    return video_sensor()(context)


def resources(store: str | None = None) -> dict[str, Any]:
    return {"store": StoreResource(root=store), "ray": RayResource()}


def test_a_file_is_taken_when_it_has_stopped_growing(folder: Path) -> None:
    instance = dg.DagsterInstance.ephemeral()
    path = folder / "b.mp4"
    path.write_bytes(b"1234")
    (folder / ".hidden.mp4").write_bytes(b"1234")
    (folder / "notes.txt").write_bytes(b"1234")
    (folder / "empty.mkv").touch()
    first = tick(instance)
    assert not first.run_requests
    with path.open("ab") as stream:
        stream.write(b"5678")
    second = tick(instance, first.cursor)
    assert not second.run_requests  # it has grown
    third = tick(instance, second.cursor)
    assert [request.partition_key for request in third.run_requests] == ["b.mp4"]
    assert [list(request.partition_keys) for request in third.dynamic_partitions_requests] == [["b.mp4"]]
    instance.add_dynamic_partitions("videos", ["b.mp4"])
    fourth = tick(instance, third.cursor)
    assert not fourth.dynamic_partitions_requests
    assert fourth.run_requests[0].run_key == third.run_requests[0].run_key  # which Dagster launches once


def test_no_folder_no_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tick(dg.DagsterInstance.ephemeral())
    assert isinstance(found, dg.SkipReason)
    assert "MLPIPES_VIDEOS is not set" in str(found.skip_message)


def test_small_files_overtake_large_ones(tmp_path: Path) -> None:
    assert priority_of(10**6) > priority_of(10**9) > priority_of(10**10)
    (tmp_path / "a.mp4").write_bytes(b"1")
    found, ready = settled(tmp_path, SUFFIXES, {})
    assert not ready
    assert settled(tmp_path, SUFFIXES, found)[1] == ["a.mp4"]


def materialize(instance: dg.DagsterInstance, name: str, store: Path, ray_home: Path, **config: Any) -> Any:
    return dg.materialize(
        video_assets(),
        instance=instance,
        partition_key=name,
        resources=resources(str(store)),
        run_config={"ops": {"video__chunks": {"config": config}}},
        raise_on_error=False,
    )


def test_a_file_that_is_no_video_fails_with_its_reason(folder: Path, tmp_path: Path) -> None:
    (folder / "bad.mp4").write_bytes(b"no video")
    instance = dg.DagsterInstance.ephemeral()
    instance.add_dynamic_partitions("videos", ["bad.mp4"])
    result = materialize(instance, "bad.mp4", tmp_path / "store", tmp_path)
    assert not result.success
    failure = result.failure_data_for_node("video__source_video")
    assert "is no video that can be read" in failure.user_failure_data.description


def test_the_chain_of_a_video(folder: Path, tmp_path: Path, ray_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPIPES_HOME", str(ray_home))
    path, store = write_video(folder / "x.mp4", 20, audio=[{}]), tmp_path / "store"
    wanted = sha256_file(upscale_here(path, tmp_path / "here", encoding=QUICK))
    instance = dg.DagsterInstance.ephemeral()
    instance.add_dynamic_partitions("videos", ["x.mp4"])
    settings = {"crf": QUICK.crf, "preset": QUICK.preset, "chunk": 8, "workers": 2}
    result = materialize(instance, "x.mp4", store, ray_home, **settings)
    assert result.success
    made = folder / "upscaled" / "x-x2.mp4"
    assert sha256_file(made) == wanted
    shown = {}
    for step in ("source_video", "chunks", "upscaled_chunks", "final_video"):
        (event,) = result.asset_materializations_for_node(f"video__{step}")
        shown[step] = event.metadata
    assert shown["chunks"]["frames"].value == 20
    assert shown["chunks"]["chunks"].value == 3
    assert shown["upscaled_chunks"]["frames_per_second"].value > 0
    assert "data:image/png;base64" in shown["upscaled_chunks"]["side_by_side"].value
    assert shown["final_video"]["size"].value == "128×96"
    assert materialize(instance, "x.mp4", store, ray_home, **settings).success  # again: found done
    assert sha256_file(made) == wanted
    assert VIDEOS.name == "videos"
    assert video.GROUP == GROUP
