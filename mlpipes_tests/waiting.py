"""Waiting in tests: for a condition, with a limit that only something broken exceeds, however busy the machine."""

import time
from collections.abc import Callable
from typing import TypeVar

LIMIT_SECONDS = 1200.0
"""Twenty times what the slowest of these waits takes on a quiet machine of two cores."""
_Answer = TypeVar("_Answer")


def until(
    condition: Callable[[], _Answer],
    what: str,
    *,
    seconds: float = LIMIT_SECONDS,
    vain: Callable[[], str] = lambda: "",
    every: float = 0.2,
) -> _Answer:
    """Wait until a condition holds, and return what it returned.

    `vain()` says, by a text, why waiting any longer is in vain. Raises AssertionError with `what` did not come to be.
    """
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        if reason := vain():
            if answer := condition():  # it has come to be since it was looked at
                break
            raise AssertionError(f"it will not be so that {what}: {reason}")
        if time.monotonic() > deadline:
            raise AssertionError(f"after {seconds:.0f} s it is not so that {what}")
        time.sleep(every)
    return answer


def comes(condition: Callable[[], object], seconds: float = 120.0) -> bool:
    """Whether a condition comes to hold in a while, such as something on a page that must be loaded again if not.

    A page whose network is idle need not be there yet: on a busy machine its program is only being read.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
