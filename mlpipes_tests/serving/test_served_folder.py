"""The server of a folder, which no MLflow is asked about: another in its place, models with code of their own."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests

from mlpipes.serving.model import Registered, write_out
from mlpipes.tracking.models import EXPORTED, FINGERPRINT, SCALE, WEIGHTS, register
from mlpipes.workloads.deployables import PythonCode
from mlpipes_tests.serving import server as servers
from mlpipes_tests.serving.models import run_in
from mlpipes_tests.serving.server import Serving
from mlpipes_tests.waiting import LIMIT_SECONDS, until

registry = servers.registry


@pytest.fixture
def own(registry: Serving) -> Iterator[Serving]:
    """One that a test starts by itself."""
    made = Serving(registry.home, registry.versions, registry.tracker, "own")
    try:
        yield made
    finally:
        made.stop()


def test_a_folder_is_served_without_mlflow_and_another_in_its_place_takes_over(own: Serving, tmp_path: Path) -> None:
    link, home = tmp_path / "model", tmp_path / "home"

    def point_to(version: str) -> None:
        new = tmp_path / "new"
        new.symlink_to(exported(own, version, tmp_path))
        new.replace(link)

    def bits() -> str:
        answer = own.ask([3, 1])
        assert answer.headers["x-model-exact"] == "true"
        version = answer.headers["x-model-version"]
        found = np.array(answer.json()["predictions"], dtype=np.float32)
        assert np.array_equal(found, own.versions[version][[3, 1]])
        return version

    point_to("1")
    own.what = ("--model", str(link))
    own.start(MLPIPES_HOME=str(home), MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert bits() == "1"
    point_to("2")
    until(lambda: bits() == "2", "the other one takes over", vain=own.ended)
    link.unlink()
    until(lambda: "is no folder with a model" in own.log, "it is told that it has gone", vain=own.ended)
    assert bits() == "2"
    assert not home.exists(), "it needs none"


def exported(server: Serving, version: str, to: Path) -> Path:
    """The folder of `mlpipes export`."""
    from typer.testing import CliRunner

    from mlpipes.cli.app import app

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLPIPES_HOME", str(server.home))
        done = CliRunner().invoke(app, ["export", "digits", "--version", version, "--output", str(to / version)])
    assert done.exit_code == 0, done.output
    return to / version


_HANGS = """
import threading

import mlflow
import pandas as pd


class Model(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: pd.DataFrame, params=None):
        if "hang" in list(model_input["text"]):
            print("it hangs", flush=True)
            threading.Event().wait()
        return pd.DataFrame({"size": [len(text) for text in model_input["text"]]})


mlflow.models.set_model(Model())
"""


def test_a_model_that_never_answers_does_not_keep_the_server_from_ending(registry: Serving, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(_HANGS)
    own = PythonCode(tmp_path / "own.py", lambda folder: None, {"text": ["a"]}, {"size": [1]}, ("pandas", "mlflow"))
    tags = {FINGERPRINT: "f", EXPORTED: "e", SCALE: "w1-b1-e1-g0", WEIGHTS: "w"}
    version = register(registry.tracker, run_in(registry.tracker, "own", "f"), "mlpipes-own", own, tags, [])
    found = registry.tracker.client.get_model_version("mlpipes-own", version)
    write_out(registry.tracker, Registered("mlpipes-own", version, str(found.source), tags), tmp_path / "own")
    server = Serving(registry.home, {}, registry.tracker, "hanging", ("--model", str(tmp_path / "own")))
    try:
        server.start()
        assert server.process is not None
        with ThreadPoolExecutor(1) as pool:
            asked = {"inputs": {"text": ["hang"]}}
            waiting = pool.submit(
                requests.post, f"{server.address}/invocations", json=asked, timeout=LIMIT_SECONDS, stream=True
            )
            until(lambda: "it hangs" in server.log, "the model hangs", vain=server.ended)
            server.process.terminate()
            assert server.process.wait(LIMIT_SECONDS) == 0
            assert waiting.exception() or waiting.result().status_code == 500
    finally:
        server.stop()
