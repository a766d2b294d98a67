"""Ray's command line without the commands that nobody asks for here: Serve's, of jobs, and of states.

Importing them takes half of the seconds before `ray start` does anything. Ray goes without each that cannot be imported, as
where it was installed without Serve. Run as `python -m mlpipes.compute.ray_start start …`.
"""

import sys

_LEFT_OUT = ("ray.serve.scripts", "ray.dashboard.modules.job.cli", "ray.util.state.state_cli")


def main() -> None:
    """Run the command line; it exits by itself."""
    sys.modules |= dict.fromkeys(_LEFT_OUT)  # with None, importing one raises ModuleNotFoundError
    from ray.scripts.scripts import main as ray

    ray()


if __name__ == "__main__":
    main()
