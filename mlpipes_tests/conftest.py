"""Fixtures: an isolated home, a tiny workload's data, real data where they are, one private Ray for the session."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mlpipes.data.dataset import Dataset, Provenance

REAL_DATA = "MLPIPES_REAL_DATA"
NO_SKIPS = "MLPIPES_NO_SKIPS"


def pytest_configure() -> None:
    """End as on Ctrl-C when asked to terminate, so that fixtures clean up: no Ray head may outlive the tests."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def missing(what: str) -> None:
    """Skip a test for want of something; in CI, where everything is to be there, fail instead."""
    if os.environ.get(NO_SKIPS):
        pytest.fail(f"{what} (and {NO_SKIPS} is set)")
    pytest.skip(what)


@pytest.fixture(autouse=True)
def isolated_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a home folder of its own and none of the user's settings."""
    for name in ("MLPIPES_SCALES", "MLPIPES_RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLPIPES_CIFAR10", "DAGSTER_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLPIPES_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def real_data() -> Path:
    """The folder with real data."""
    if not (folder := os.environ.get(REAL_DATA)):
        missing(f"{REAL_DATA} is not set: no real data to test with")
    return Path(str(folder)).absolute()


def tiny_dataset(rows: int = 120, classes: int = 3, seed: int = 0) -> Dataset:
    """Images 8×8 of as many brightnesses as classes, with noise."""
    generator = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    images = generator.integers(0, 6, (rows, 1, 8, 8)) + labels[:, None, None, None] * 4
    return Dataset(
        splits={"train": {"image": images.astype(np.uint8), "label": labels.astype(np.int64)}},
        provenance=Provenance("tiny", "none", "made by a test", "synthetic"),
        facts={"class_names": [str(c) for c in range(classes)], "pixel_maximum": 16},
    )


@pytest.fixture(scope="session")
def ray_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home folder with a running private Ray, ended with the session; tests that need Ray share its start-up."""
    from mlpipes.compute.local import LocalRay

    folder = tmp_path_factory.mktemp("ray-home")
    ray = LocalRay(folder / "ray")
    try:
        ray.ensure()
        yield folder
    finally:
        ray.stop()
