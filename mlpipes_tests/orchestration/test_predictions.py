"""The asset of a workload's predictions: files that are put into its folder are answered, each once."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow.parquet as pq
import pytest

from mlpipes.definitions import build_defs
from mlpipes.orchestration.predictions import inputs_sensor, predictions_jobs
from mlpipes.workloads.catalog import CATALOG
from mlpipes_tests.serving.models import IMAGES, champion, registered, tracker_in


class Place:
    """Definitions of `digits`, a Dagster instance, a folder of inputs, and a champion without a training."""

    def __init__(self, home: Path) -> None:
        self.inputs = home / "inputs" / "digits"
        self.inputs.mkdir(parents=True)
        (home / "dagster").mkdir()
        self.instance = dg.DagsterInstance.local_temp(str(home / "dagster"))
        self.definitions = build_defs(catalog=[CATALOG[0]])
        tracker = tracker_in(home)
        version, self.evaluated = registered(tracker, 1)
        champion(tracker, version)

    def tick(self, cursor: str | None = None) -> Any:
        """What the sensor asks for."""
        context = dg.build_sensor_context(self.instance, cursor=cursor, definitions=self.definitions)
        return inputs_sensor([CATALOG[0]], predictions_jobs([CATALOG[0]]))(context)

    def answer(self, name: str, **config: Any) -> Any:
        """Launch a file; returns the result of the run."""
        self.instance.add_dynamic_partitions("digits_inputs", [name])
        return self.definitions.resolve_job_def("digits_predictions").execute_in_process(
            instance=self.instance,
            partition_key=name,
            run_config={"ops": {"digits__predictions": {"config": config}}},
            raise_on_error=False,
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    home = tmp_path_factory.mktemp("predictions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLPIPES_HOME", str(home))
        patch.setenv("MLPIPES_INPUTS", str(home / "inputs"))
        yield Place(home)


@pytest.fixture
def place(made: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    home = made.inputs.parents[1]
    monkeypatch.setenv("MLPIPES_HOME", str(home))  # which is cleared before each test
    monkeypatch.setenv("MLPIPES_INPUTS", str(home / "inputs"))
    return made


def metadata_of(result: Any) -> dict[str, Any]:
    (event,) = result.get_asset_materialization_events()
    return {name: value.value for name, value in event.materialization.metadata.items()}


def test_a_file_is_answered_with_the_bits_of_the_evaluation_and_again_at_once(place: Place) -> None:
    np.save(place.inputs / "images.npy", IMAGES)
    result = place.answer("images.npy", workers=1)
    assert result.success
    found = pq.read_table(place.inputs / "answers" / "images.parquet")
    assert np.array_equal(np.array(found["prediction"].to_pylist(), dtype=np.float32), place.evaluated)
    metadata = metadata_of(result)
    assert (metadata["rows"], metadata["answered_before"]) == (len(IMAGES), 0)
    assert metadata["model"] == "models:/mlpipes-digits/1"
    assert metadata["exact"] is True
    assert sum(int(text.split()[0]) for text in _pairs(metadata).values()) == len(IMAGES)
    again = place.answer("images.npy", format="csv")
    assert again.success
    assert metadata_of(again)["answered_before"] == len(IMAGES)
    assert (place.inputs / "answers" / "images.csv").is_file()


def _pairs(metadata: dict[str, Any]) -> dict[str, str]:
    """A table of two columns, of Markdown."""
    text = str(metadata["labels"])
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")][2:]
    return {name.strip(): value.strip() for name, value, *_ in rows}


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        ("absent.npy", {}, "is not there"),
        ("table.csv", {}, r"a file that ends with \.npy"),
        ("images2.npy", {"version": "99"}, "is not registered"),
    ],
)
def test_what_cannot_be_answered_is_told(place: Place, name: str, config: dict[str, Any], says: str) -> None:
    if not name.startswith("absent"):
        (place.inputs / name).write_bytes(b"text\nx\n")
    result = place.answer(name, **config)
    assert not result.success
    (failure,) = [event for event in result.all_node_events if event.is_step_failure]
    assert re.search(says, failure.step_failure_data.error_display_string)


def test_files_are_found_when_they_have_stopped_growing_each_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place.inputs / "new.npy").write_bytes(b"1")
    (place.inputs / "not-this.txt").write_bytes(b"1")
    first = place.tick()
    assert not first.run_requests
    (place.inputs / "new.npy").write_bytes(b"12")
    second = place.tick(first.cursor)
    assert "new.npy" not in {request.partition_key for request in second.run_requests}
    third = place.tick(second.cursor)
    (request,) = [request for request in third.run_requests if request.partition_key == "new.npy"]
    assert request.job_name == "digits_predictions"
    assert request.run_key.startswith("digits/new.npy:2:")
    assert any("new.npy" in each.partition_keys for each in third.dynamic_partitions_requests)
    assert "not-this.txt" not in {each.partition_key for each in third.run_requests}
    monkeypatch.delenv("MLPIPES_INPUTS")
    assert "MLPIPES_INPUTS is not set" in str(place.tick().skip_message)
