"""Processes of this machine, found by a variable of their environment, which children inherit and nobody else has."""

from collections.abc import Iterator

import psutil


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
