"""How a raylet starts a worker: what Ray's `setup_worker.py` does, without importing Ray for it.

That import takes 0.6 CPU-seconds, and each process of a training waits for it before it begins: the job's supervisor,
Train's controller, the workers. What else than variables and a command of Python a job's context has is left to Ray's own.

Run by its path, for nothing else is known there: `python …/ray_setup_worker.py <worker> --serialized-runtime-env-context=…`.
A raylet knows Ray's own by its name, which this one shares for that: it leaves it out where a worker belongs to no job.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

_UNDERSTOOD = {"env_vars", "py_executable"}


def command_of(arguments: Sequence[str]) -> tuple[str, dict[str, str]] | None:
    """The worker's command, for a shell, and its variables; None for what only Ray knows how to do."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--serialized-runtime-env-context", default="{}")
    parser.add_argument("--language")
    options, worker = parser.parse_known_args(arguments)
    context = json.loads(options.serialized_runtime_env_context or "{}")
    variables, python = context.get("env_vars") or {}, context.get("py_executable") or sys.executable
    asks_for_more = any(value for name, value in context.items() if name not in _UNDERSTOOD)
    refers_to_others = any("$" in value for value in variables.values())
    if sys.platform != "linux" or options.language != "PYTHON" or asks_for_more or refers_to_others:
        return None
    return f"exec {python} {shlex.join(worker)}", variables


def main(arguments: Sequence[str]) -> None:
    """Become the worker."""
    if (found := command_of(arguments)) is not None:
        command, variables = found
        os.environ.update(variables)
        words = ["bash", "-c", command]
    else:
        words = [sys.executable, str(_of_ray()), *arguments]
    os.execvp(words[0], words)  # noqa: S606 - the raylet knows its worker by this process's number


def _of_ray() -> Path:
    """Ray's own program. It is looked for without an import of Ray."""
    ray = find_spec("ray")
    if ray is None or ray.origin is None:
        raise ModuleNotFoundError("Ray has started this process, and cannot be found in it")
    return Path(ray.origin).parent / "_private" / "workers" / "setup_worker.py"


if __name__ == "__main__":
    main(sys.argv[1:])
