"""Ray's command line as our nodes need it: begun sooner, and not given up where a machine is slow.

- Without the commands that nobody asks for here (Serve's, of jobs, of states): importing them takes half of the seconds
  before `ray start` does anything. Ray goes without each that cannot be imported, as where it was installed without Serve.
- A raylet waits for the file in which its dashboard agent says at which port it listens, and ends itself after 15 s, which
  cannot be set. Under other work the agent may need that for its imports alone; `ray start` gives up another 15 s later. The
  port is one that we have chosen: the file is there when the raylet looks, and `ray start` waits for the agent instead.
- Its workers are started by `ray_setup_worker` instead of a program of Ray's that imports Ray to do so. As many may start at
  once as a training of two takes, also where there are fewer cores. None is started ahead: what our jobs start on a private
  Ray has variables of its own, so that they could not use it, and would wait for it.
- Its dashboard and agents run by `ray_service`. There is no server for drivers that are not jobs, a process and a port more.

Run as `python -m mlpipes.compute.ray_start start …`.
"""

import inspect
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from mlpipes.compute import ray_service, ray_setup_worker

_LEFT_OUT = ("ray.serve.scripts", "ray.dashboard.modules.job.cli", "ray.util.state.state_cli")
_PORT = "dashboard_agent_listen_port"
_AGENT_SECONDS = 240
_SETUP = "setup_worker_path"
_AGENT, _SERVICES = "--dashboard_agent_command=", ("dashboard/dashboard.py", "dashboard/agent.py")
_AHEAD, _AT_ONCE, _LEAST = "--num_prestart_python_workers=", "--maximum_startup_concurrency=", 4


def main() -> None:
    """Run the command line; it exits by itself."""
    sys.modules |= dict.fromkeys(_LEFT_OUT)  # with None, importing one raises ModuleNotFoundError
    from ray._private import services
    from ray.scripts import scripts

    # As where what that server is made of is not installed.
    scripts.get_ray_client_dependency_error = lambda: "nobody asks for it"  # pyright: ignore[reportPrivateImportUsage]
    with suppress(ImportError, AttributeError):  # another Ray may have other names, and starts without as it does
        services.start_ray_process = _lean(services.start_ray_process)
        services.start_raylet = _patient(services.start_raylet)
    scripts.main()


def _lean(start_process: Any) -> Any:
    """Ray's function that starts one of its processes, with less for it to do."""

    def start(command: list[str], *arguments: Any, **options: Any) -> Any:
        return start_process(leaner(command), *arguments, **options)

    return start


def leaner(command: Sequence[str]) -> list[str]:
    """The command line of one of Ray's processes, as our nodes start it."""
    words = list[str]()
    for word in command:
        if word.startswith(_AHEAD):
            words.append(f"{_AHEAD}0")
        elif word.startswith(_AT_ONCE):
            words.append(f"{_AT_ONCE}{max(int(word.removeprefix(_AT_ONCE)), _LEAST)}")
        elif word.startswith(_AGENT):  # a command in a word
            try:
                words.append(_AGENT + subprocess.list2cmdline(leaner(shlex.split(word.removeprefix(_AGENT)))))
            except ValueError:  # a path with a quotation mark
                words.append(word)
        else:
            words += [ray_service.__file__] * word.endswith(_SERVICES)
            words.append(word)
    return words


def _patient(start_raylet: Any) -> Any:
    """Ray's function that starts a raylet, with workers by `ray_setup_worker`, waiting for the agent where it would not."""
    from ray._raylet import persist_port  # pyright: ignore[reportAttributeAccessIssue] - compiled

    from mlpipes.compute.ray_node import listens

    signature = inspect.signature(start_raylet)

    def start(*arguments: Any, **options: Any) -> Any:
        bound = signature.bind(*arguments, **options)
        told = bound.arguments
        if _SETUP in told:
            told[_SETUP] = ray_setup_worker.__file__
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
