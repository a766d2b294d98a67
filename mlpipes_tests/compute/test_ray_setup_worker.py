"""How a raylet's workers are started: as Ray does it, without Ray where it is not needed."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlpipes.compute import ray_setup_worker
from mlpipes.compute.ray_setup_worker import command_of
from mlpipes_tests.waiting import LIMIT_SECONDS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Ray starts its workers itself")

_WORKER = """
import json, os, sys
told = {"arguments": sys.argv[1:], "variable": os.environ.get("COLOUR"), "parent": os.getppid()}
print(json.dumps(told | {"home": os.environ.get("HOME"), "command": os.environ.get("BY_COMMAND")}))
"""
_WATCHED = """
import runpy, sys
sys.addaudithook(lambda event, found: print("IMPORTED", file=sys.stderr) if (event, found[0]) == ("import", "ray") else None)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def started(tmp_path: Path, *words: str, language: str = "PYTHON", **context: Any) -> tuple[dict[str, Any], str]:
    """What a worker finds that is started in a context of a job, and the errors of whoever starts it."""
    (worker := tmp_path / "a worker.py").write_text(_WORKER)
    options = [f"--serialized-runtime-env-context={json.dumps(context)}", f"--language={language}"]
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED, ray_setup_worker.__file__, str(worker), *words, *options],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_a_worker_gets_its_variables_and_its_words_and_ray_is_not_imported(tmp_path: Path) -> None:
    words = ["--node=1", "two words", "a'b", "$HOME"]
    by = f"env BY_COMMAND=yes {shlex.quote(sys.executable)}"
    told, errors = started(tmp_path, *words, env_vars={"COLOUR": "dark blue"}, py_executable=by)
    assert told == {
        "arguments": words,
        "variable": "dark blue",
        "parent": os.getpid(),
        "home": os.environ.get("HOME"),
        "command": "yes",
    }
    assert "IMPORTED" not in errors


def test_a_worker_of_no_job_is_started_by_the_same_python(tmp_path: Path) -> None:
    told, errors = started(tmp_path, "--node=1", env_vars=None, py_executable=None)
    assert (told["arguments"], told["variable"], told["command"]) == (["--node=1"], None, None)
    assert "IMPORTED" not in errors


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        ({"env_vars": {"COLOUR": "at ${HOME}"}}, {"variable": f"at {os.environ.get('HOME', '')}"}),
        ({"command_prefix": ["COLOUR=red"]}, {"variable": "red"}),
    ],
)
def test_what_only_ray_knows_is_left_to_ray(tmp_path: Path, context: dict[str, Any], expected: dict[str, Any]) -> None:
    told, _ = started(tmp_path, "--node=1", **context)
    assert told["arguments"] == ["--node=1"]
    assert told.items() >= expected.items()


@pytest.mark.parametrize("more", [{"override_worker_entrypoint": "/in/a/container.py"}, {"something_new": "yes"}])
def test_a_context_with_anything_else_is_not_understood(more: dict[str, Any]) -> None:
    def asked(context: dict[str, Any], language: str = "PYTHON") -> object:
        options = ["--serialized-runtime-env-context", json.dumps(context), "--language", language]
        return command_of(["worker.py", *options])

    assert asked({}) == (f"exec {sys.executable} worker.py", {})
    assert asked(more) is None
    assert asked({}, "CPP") is None
    assert command_of(["worker.py"]) is None, "of no language"
