"""Fixtures: an isolated home, a tiny workload's data, real data where they are, one private Ray for the session."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import pytest

from mlpipes.data.dataset import Dataset, Provenance
from mlpipes_tests import evidence, leftovers, prepared
from mlpipes_tests.barriers import HASTE

REAL_DATA = "MLPIPES_REAL_DATA"
NO_SKIPS = "MLPIPES_NO_SKIPS"
UNTIL = "MLPIPES_TESTS_UNTIL"
"""Seconds since 1970 after which no test begins, where time is limited: what has begun still ends in time."""
_LONG = ("chaos", "integration", "ui")
_SWITCHES = (REAL_DATA, NO_SKIPS, UNTIL, HASTE)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy", "no_proxy", "grpc_proxy", "no_grpc_proxy")
_TERMINAL = ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "CLICOLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE")


def _settings(*prefixes: str) -> list[str]:
    """The names of variables with these prefixes, less the tests' own switches."""
    return [name for name in os.environ if name.startswith(prefixes) and not name.startswith(_SWITCHES)]


def pytest_configure(config: pytest.Config) -> None:
    """Forget the user's settings, and have leftovers looked for; then end on SIGTERM as on Ctrl-C, so that fixtures do."""
    for name in [
        *_settings(
            "MLPIPES_", "RAY_", "MLFLOW_", "DAGSTER_", "GIT_"
        ),  # of a hook of git, which would be this checkout's
        *(n for n in os.environ if n.lower() in _PROXIES or n in _TERMINAL),
    ]:
        del os.environ[name]
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    leftovers.watch(config)
    # Also SIGINT: in a background job of a shell it is ignored, and would be in all that the tests start.
    for number in _SIGNALS:
        signal.signal(number, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long ones first, so that no process has nothing to do at the end."""
    items.sort(key=lambda item: item.path.parent.name not in _LONG)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Leave out what there is no time for, and say so."""
    if time.time() > float(os.environ.get(UNTIL, "inf")):
        pytest.skip(f"LEFT OUT, for {UNTIL} is past: this machine is slow, or busy")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failing test's report has the logs of what it ran."""
    report = yield
    if report.failed:
        report.sections += evidence.sections()
    return report


def missing(what: str) -> None:
    """Skip a test for want of something; in CI, where everything is to be there, fail instead."""
    if os.environ.get(NO_SKIPS):
        pytest.fail(f"{what} (and {NO_SKIPS} is set)")
    pytest.skip(what)


@pytest.fixture(scope="module", autouse=True)
def _nothing_of_other_modules() -> None:
    """A module's own fixtures are made before `isolated_home`, and MLflow keeps where it was sent in a variable."""
    evidence.begin()
    for name in _settings("MLPIPES_", "MLFLOW_", "DAGSTER_"):
        del os.environ[name]


@pytest.fixture(autouse=True)
def isolated_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a home folder of its own, and nothing that the one before has left: MLflow sets variables, remembers an
    experiment and where its registry is, and programs that a test calls in this process set how signals are dealt with.
    """
    if registry := sys.modules.get("mlflow.tracking._model_registry.utils"):
        registry._registry_uri = None  # type: ignore[attr-defined]
    if fluent := sys.modules.get("mlflow.tracking.fluent"):
        fluent._active_experiment_id = None  # type: ignore[attr-defined] - there is no other way back
    for number in _SIGNALS:
        signal.signal(number, signal.default_int_handler)
    for name in _settings("MLPIPES_", "MLFLOW_", "DAGSTER_"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLPIPES_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def short() -> Iterator[Path]:
    """A temporary folder whose path is short enough for Unix sockets, whatever the user's is."""
    from mlpipes.compute.ray_node import short_folder

    folder = short_folder("s-")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def real_data() -> Path:
    """The folder with real data."""
    if not (folder := os.environ.get(REAL_DATA)):
        missing(f"{REAL_DATA} is not set: no real data to test with")
    return Path(str(folder)).absolute()


@pytest.fixture
def cases(real_data: Path) -> Path:
    """The folder with tables, encoders and images of CIFAR-10's layout as other people have them."""
    if not (folder := real_data / "cases").is_dir():
        missing(f"{folder} is not there: no cases to test with")
    return folder


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
    evidence.collect_from(folder)
    prepared.mlflow_store(folder / "mlflow" / "mlflow.db")
    ray = LocalRay(folder / "ray")
    try:
        ray.ensure()
        yield folder
    finally:
        ray.stop()
