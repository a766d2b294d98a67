"""Barriers: a training waits at a point of its way until the test has done its deed, so that no test races with a training.

A barrier is a file in the home folder, by whose name the workload of `held.py` finds it wherever it runs: `0.5` closes the
way at half of all steps. The training tells that it is there by `0.5.reached`. The engine knows nothing of barriers.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

from mlpipes_tests.waiting import until

HASTE = "MLPIPES_TEST_HASTE"
"""Environment variable: how many times fewer steps than usual the trainings that wait at barriers have (`held.py`)."""
_LOOK_SECONDS = 0.02
_PAUSE_SECONDS = 0.6
"""A barrier holds a training at least so long: messages of progress are half a second apart, so the next step sends one."""


def haste() -> int:
    """How many times faster than usual trainings are to be that wait at barriers."""
    return int(os.environ.get(HASTE, "1"))


class Barriers:
    """The barriers of one home folder; a place is a fraction of a training's steps."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "barriers"

    def close(self, *places: float) -> None:
        """Close the way, before the training is launched or while it waits at an earlier barrier."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for place in places:
            self._reached(place).unlink(missing_ok=True)
            self._barrier(place).touch()

    def open(self, *places: float) -> None:
        """Let the training go on; without places, through all barriers."""
        for barrier in map(self._barrier, places) if places else self._closed():
            barrier.unlink(missing_ok=True)

    def wait_for(self, place: float, vain: Callable[[], str] = lambda: "") -> None:
        """Wait until a training is at a barrier. Raises AssertionError, at once if `vain()` says why it will not come."""
        until(self._reached(place).exists, f"the training has come to its barrier at {place}", vain=vain)

    def hold(self, progress: float) -> None:
        """In the training: wait while a barrier at or before this point is closed."""
        while closed := [barrier for barrier in self._closed() if float(barrier.name) <= progress]:
            for barrier in closed:
                self._reached(float(barrier.name)).touch()
            time.sleep(_PAUSE_SECONDS)
            while any(barrier.exists() for barrier in closed):
                time.sleep(_LOOK_SECONDS)

    def _closed(self) -> list[Path]:
        return [path for path in self.folder.glob("*") if path.suffix != ".reached"] if self.folder.is_dir() else []

    def _barrier(self, place: float) -> Path:
        return self.folder / str(place)

    def _reached(self, place: float) -> Path:
        return self.folder / f"{place}.reached"
