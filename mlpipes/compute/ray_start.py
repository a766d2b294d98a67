"""Ray's command line as our nodes need it: begun sooner, and not given up where a machine is slow.

- Without the commands that nobody asks for here (Serve's, of jobs, of states): importing them takes half of the seconds
  before `ray start` does anything. Ray goes without each that cannot be imported, as where it was installed without Serve.
- A raylet waits for the file in which its dashboard agent says at which port it listens, also if it was told the port, and
  ends itself after 15 s, which cannot be set. Under other work the agent may need that for its imports alone; `ray start`
  gives up another 15 s later. The port is known before: the file is there when the raylet looks.

Run as `python -m mlpipes.compute.ray_start start …`.
"""

import inspect
import sys
from typing import Any

_LEFT_OUT = ("ray.serve.scripts", "ray.dashboard.modules.job.cli", "ray.util.state.state_cli")
_PORT = "dashboard_agent_listen_port"


def main() -> None:
    """Run the command line; it exits by itself."""
    sys.modules |= dict.fromkeys(_LEFT_OUT)  # with None, importing one raises ModuleNotFoundError
    from ray._private import services
    from ray.scripts.scripts import main as ray

    services.start_raylet = _with_a_known_port(services.start_raylet)
    ray()


def _with_a_known_port(start_raylet: Any) -> Any:
    """Ray's function that starts a raylet, which first says for the agent where it is going to listen."""
    from ray._raylet import persist_port  # pyright: ignore[reportAttributeAccessIssue] - compiled

    def start(*arguments: Any, **options: Any) -> Any:
        told = inspect.signature(start_raylet).bind(*arguments, **options).arguments
        if told[_PORT]:  # the agent writes the same, or -1 where it cannot listen
            persist_port(told["session_dir"], told["node_id"], _PORT, told[_PORT])
        return start_raylet(*arguments, **options)

    return start


if __name__ == "__main__":
    main()
