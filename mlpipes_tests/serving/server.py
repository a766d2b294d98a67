"""A real server process in a home with registered models."""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from mlpipes_tests import evidence
from mlpipes_tests.sandbox import CHECKOUT, end
from mlpipes_tests.serving.models import IMAGES, registered, tracker_in
from mlpipes_tests.waiting import LIMIT_SECONDS, until


@dataclass
class Serving:
    """A home with registered models, and a server that is started in it."""

    home: Path
    versions: dict[str, np.ndarray]
    """What the evaluation of each would say of `IMAGES`."""
    tracker: Any
    name: str = "server"
    what: tuple[str, ...] = ("digits",)
    process: "subprocess.Popen[bytes] | None" = None
    address: str = ""

    @property
    def log(self) -> str:
        return (self.home / f"{self.name}.log").read_text()

    def start(self, *options: str, **environment: str) -> "Serving":
        assert self.process is None
        base = {name: value for name, value in os.environ.items() if not name.startswith(("MLPIPES_", "MLFLOW_"))}
        environment = base | {"MLPIPES_HOME": str(self.home), "COLUMNS": "200", "PYTHONUNBUFFERED": "1"} | environment
        command = (f"{CHECKOUT}/.venv/bin/mlpipes", "serve", *self.what, "--port", "0", "--poll", "0.1", *options)
        with (self.home / f"{self.name}.log").open("wb") as out:
            self.process = subprocess.Popen(
                command,
                env=environment,
                cwd=self.home,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        until(lambda: "is served, after" in self.log, "the server has loaded its model", vain=self.ended)
        found = re.search(r"(https?://\S+) \(try", self.log)
        assert found
        self.address = found[1]
        return self

    def ended(self) -> str:
        assert self.process is not None
        return f"it has ended: {self.log}" if self.process.poll() is not None else ""

    def stop(self) -> None:
        if self.process is not None:
            end(self.process)
            self.process = None

    def ask(self, rows: Any, **options: Any) -> requests.Response:
        return requests.post(
            f"{self.address}/invocations", json={"inputs": IMAGES[rows].tolist()}, timeout=LIMIT_SECONDS, **options
        )


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Serving:
    home = tmp_path_factory.mktemp("serving")
    evidence.collect_from(home)
    tracker = tracker_in(home)
    return Serving(home, dict(registered(tracker, seed) for seed in (1, 2)), tracker)
