"""Processes of this machine, found by a variable of their environment, which children inherit and nobody else has."""

from collections.abc import Iterator, Sequence

import psutil

_CLEANING_SECONDS = 10.0


def running() -> Iterator[psutil.Process]:
    """Every process that runs now, as a new object.

    `psutil.process_iter` keeps the objects of earlier looks. Where a number has been given to another process meanwhile
    (Linux has 32,768 by default), a kept one still reads the new process's environment, but has no children and cannot be
    ended: a node of Ray would be overlooked, and live on.
    """
    psutil.process_iter.cache_clear()
    yield from psutil.process_iter()


def variable_of(process: psutil.Process, name: str) -> str | None:
    """A variable of a process, or None if it has none, is another user's, or has ended."""
    try:
        return process.environ().get(name)
    except (psutil.Error, OSError):
        return None


def with_variable(name: str, value: str) -> list[psutil.Process]:
    """The processes whose environment has a variable with a value."""
    return [process for process in running() if variable_of(process, name) == value]


def kill(processes: Sequence[psutil.Process], seconds: float = 2.0) -> None:
    """End processes for good, and wait so long for it.

    Python's `multiprocessing` leaves semaphores in shared memory to a process that removes them once those that used them
    have ended; killed together with them, it would remove nothing. So it comes last, and only if it does not end by itself.
    """
    cleaning = [process for process in processes if _is_tracker(process)]
    _kill([process for process in processes if process not in cleaning], seconds)
    _, left = psutil.wait_procs(cleaning, timeout=_CLEANING_SECONDS)
    _kill(left, seconds)


def _is_tracker(process: psutil.Process) -> bool:
    try:
        return "multiprocessing.resource_tracker" in " ".join(process.cmdline())
    except (psutil.Error, OSError):
        return False


def _kill(processes: Sequence[psutil.Process], seconds: float) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.Error:
            continue
    psutil.wait_procs(processes, timeout=seconds)
