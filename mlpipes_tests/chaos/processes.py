"""What is known of a process: its variables and its command line."""

import psutil


def environment_of(process: psutil.Process) -> dict[str, str]:
    """A process's variables; none if it is gone."""
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def command_of(process: psutil.Process) -> str:
    """A process's command line; empty if it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
