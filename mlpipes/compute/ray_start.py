"""Ray's command line as our nodes need it: begun sooner, and not given up where a machine is slow.

- Without the commands that nobody asks for here (Serve's, of jobs, of states): importing them takes half of the seconds
  before `ray start` does anything. Ray goes without each that cannot be imported, as where it was installed without Serve.
- A raylet waits for the file in which its dashboard agent says at which port it listens, and ends itself after 15 s, which
  cannot be set. Under other work the agent may need that for its imports alone; `ray start` gives up another 15 s later. The
  port is one that we have chosen: the file is there when the raylet looks, and `ray start` waits for the agent instead.
- Its workers are started by `ray_worker` instead of a program of Ray's that imports Ray to do so. As many may start at once
  as a training of two takes, also where there are fewer cores. None is started ahead: jobs of ours, which have variables of
  their own, cannot use it, and wait for it.

Run as `python -m mlpipes.compute.ray_start start …`.
"""

import inspect
import sys
import time
from contextlib import suppress
from typing import Any

from mlpipes.compute import ray_worker

_LEFT_OUT = ("ray.serve.scripts", "ray.dashboard.modules.job.cli", "ray.util.state.state_cli")
_PORT = "dashboard_agent_listen_port"
_AGENT_SECONDS = 240
_SETUP = "setup_worker_path"
_AHEAD, _AT_ONCE, _LEAST = "--num_prestart_python_workers=", "--maximum_startup_concurrency=", 4


def main() -> None:
    """Run the command line; it exits by itself."""
    sys.modules |= dict.fromkeys(_LEFT_OUT)  # with None, importing one raises ModuleNotFoundError
    from ray._private import services
    from ray.scripts.scripts import main as ray

    with suppress(ImportError, AttributeError):  # another Ray may have other names, and starts without as it does
        services.start_ray_process = _frugal(services.start_ray_process)
        services.start_raylet = _patient(services.start_raylet)
    ray()


def _frugal(start_process: Any) -> Any:
    """Ray's function that starts one of its processes, with other numbers of workers for a raylet."""

    def start(command: list[str], *arguments: Any, **options: Any) -> Any:
        return start_process([_fewer(word) for word in command], *arguments, **options)

    return start


def _fewer(word: str) -> str:
    if word.startswith(_AHEAD):
        return f"{_AHEAD}0"
    if word.startswith(_AT_ONCE):
        return f"{_AT_ONCE}{max(int(word.removeprefix(_AT_ONCE)), _LEAST)}"
    return word


def _patient(start_raylet: Any) -> Any:
    """Ray's function that starts a raylet, with workers by `ray_worker`, waiting for the agent where it would not."""
    from ray._raylet import persist_port  # pyright: ignore[reportAttributeAccessIssue] - compiled

    from mlpipes.compute.ray_node import listens

    signature = inspect.signature(start_raylet)

    def start(*arguments: Any, **options: Any) -> Any:
        bound = signature.bind(*arguments, **options)
        told = bound.arguments
        if _SETUP in told:
            told[_SETUP] = ray_worker.__file__
            arguments, options = bound.args, bound.kwargs
        folder, node, host, port = map(told.get, ("session_dir", "node_id", "node_ip_address", _PORT))
        if not (folder and node and host and port):
            return start_raylet(*arguments, **options)
        persist_port(folder, node, _PORT, port)
        started = start_raylet(*arguments, **options)
        deadline = time.monotonic() + _AGENT_SECONDS
        # A raylet ends with its agent. What has become of it Ray looks for itself.
        while started.process.poll() is None and not listens(host, port) and time.monotonic() < deadline:
            time.sleep(0.1)
        return started

    return start


if __name__ == "__main__":
    main()
