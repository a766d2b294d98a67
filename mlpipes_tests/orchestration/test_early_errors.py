"""Hyperparameters that do not go with the model are an error of `checkpoints` before Ray is asked or anything is written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import torch

from mlpipes.orchestration.assets import workload_assets
from mlpipes.orchestration.resources import MlflowResource, RayResource, ReferenceIOManager, StoreResource
from mlpipes.scales import scales_of
from mlpipes.training.model_check import check_model
from mlpipes.workloads.catalog import Entry
from mlpipes_tests.texts import DEEP, FOLDER, write_tables
from mlpipes_tests.training import odd
from mlpipes_tests.training.harness import DIGITS, make_job

ODD = "mlpipes_tests.training.odd:"


class AskedError(Exception):
    """Ray was asked for: there was no error before."""


def failure(folder: Path, implementation: str, scale: str, hyperparameters: dict[str, Any]) -> str:
    """What the run of dataset, snapshot and checkpoints ends with."""
    entry, store = Entry("mine", "Mine", implementation, scales_of([scale], "test")), StoreResource(root=str(folder))
    result = dg.materialize(
        workload_assets(entry)[:3],
        partition_key=scale,
        resources={
            "store": store,
            "io_manager": ReferenceIOManager(store=store),
            "ray": RayResource(),
            "mlflow": MlflowResource(),
        },
        run_config={"ops": {"mine__checkpoints": {"config": {"hyperparameters": hyperparameters}}}},
        raise_on_error=False,
    )
    (failed,) = [event for event in result.all_events if event.is_step_failure]
    return failed.step_failure_data.error_display_string


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of such small models, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object) -> None:
        raise AskedError

    monkeypatch.setattr(RayResource, "jobs", ask)
    monkeypatch.setattr(MlflowResource, "tracker", ask)


@pytest.mark.parametrize(
    ("implementation", "scale", "hyperparameters", "said"),
    [
        (DEEP, "w1-b32-e1-g0", {"freeze_layers": 3}, "mine: freeze_layers is 3, but the encoder has 2 layers"),
        (DIGITS, "w1-b128-e1-g0", {"network": "airbench"}, "mine: airbench cannot read images of 8×8 pixels"),
        (DIGITS, "w1-b128-e1-g0", {"crop_padding": 8}, "mine: crop_padding is 8, but the images are 8×8 pixels"),
        (DIGITS, "w1-b128-e1-g0", {"width": 10**7}, "mine: `build_model` raised RuntimeError: "),
        (f"{ODD}one_sample_normalised", "w1-b4-e1-g0", {}, "batch normalisation got a single sample"),
        (f"{ODD}one_sample_normalised", "w1-b12-e1-g0", {"micro_batch": 2}, "a larger `micro_batch` that leaves no"),
        (f"{ODD}frozen", "w1-b12-e1-g0", {}, "mine: the model has no weights to train"),
        (f"{ODD}double", "w1-b12-e1-g0", {}, "mine: weights that are trained must be float32"),
    ],
)
def test_what_does_not_go_with_the_model_is_said_before_ray_is_asked(
    implementation: str,
    scale: str,
    hyperparameters: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(FOLDER, str(write_tables(tmp_path)))
    error = failure(tmp_path / "store", implementation, scale, hyperparameters)
    assert said in error
    assert "AskedError" not in error
    assert error.startswith("dagster._core.definitions.events.Failure: "), "and no retry repeats it"
    assert not (tmp_path / "store" / "trainings").exists()


def test_what_goes_with_it_is_left_to_ray(tmp_path: Path) -> None:
    assert "AskedError" in failure(tmp_path / "store", DIGITS, "w1-b128-e1-g0", {"crop_padding": 7, "micro_batch": 7})


def test_an_error_of_build_model_names_the_line_and_one_that_only_this_machine_has_is_left_to_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(*_: object) -> None:
        raise RuntimeError("this kernel is for CUDA")

    monkeypatch.setattr(odd.Plain, "loss", loss)
    assert "AskedError" in failure(tmp_path / "a", f"{ODD}plain", "w1-b12-e1-g0", {})

    def build_model(self: Any, *_: object) -> None:
        raise AssertionError("embed_dim must be divisible by num_heads")

    monkeypatch.setattr(odd.Plain, "build_model", build_model)
    error = failure(tmp_path / "b", f"{ODD}plain", "w1-b12-e1-g0", {})
    assert "mine: `build_model` raised AssertionError: embed_dim must be divisible by num_heads (" in error
    assert "test_early_errors.py, line" in error


def test_it_leaves_random_numbers_as_they_were(tmp_path: Path) -> None:
    from mlpipes.data.snapshot import open_snapshot

    job = make_job(tmp_path, "w1-b128-e1-g0")
    before = torch.get_rng_state()
    check_model(job.recipe, open_snapshot(job.snapshot))
    assert torch.equal(before, torch.get_rng_state())
