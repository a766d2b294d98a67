"""Upscalers of tests: one that waits where a test says so, ones that fail, and one that looks at neighbours."""

import os
import time
from pathlib import Path

import numpy as np

from mlpipes.store.files import write_atomic
from mlpipes.store.layout import home
from mlpipes.video.models import Bicubic
from mlpipes_tests.video.made import number_in


class Gated(Bicubic):
    """Bicubic; waits before a frame whose number is the name of a file in the folder `gate`, and tells its process there."""

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """The frames, upscaled."""
        folder = home() / "gate"
        for number in map(number_in, frames):
            while (folder / str(number)).exists():
                _tell(folder / f"{number}.reached")
                time.sleep(0.02)
        return super().__call__(frames)


def _tell(path: Path) -> None:
    """Write this process's number into a file, if it is not there yet, so that nobody reads half of it."""
    mine = str(os.getpid())
    if not path.exists() or path.read_text() != mine:
        write_atomic(path, mine.encode())


class Slow(Bicubic):
    """Bicubic, with a pause, so that there is time to kill something."""

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """The frames, upscaled."""
        time.sleep(1)
        return super().__call__(frames)


class Failing(Bicubic):
    """Fails at frame 9, the first time or, if a file says so, always."""

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """The frames, upscaled, if it does not fail."""
        marker, always = home() / "failed-once", home() / "fail-always"
        if 9 in map(number_in, frames) and (always.exists() or not marker.exists()):
            marker.touch()
            raise RuntimeError("a defect of this model")
        return super().__call__(frames)


class Neighbours:
    """Of three neighbours: the one before as red, the frame itself as green, the one behind as blue."""

    scale, frames, reach = 2, 3, 0

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """The mixed frames, upscaled."""
        mixed = np.stack([frames[:, 0, ..., 0], frames[:, 1, ..., 1], frames[:, 2, ..., 2]], -1)
        return np.repeat(np.repeat(mixed, 2, 1), 2, 2)


def wait_at(home_folder: Path, number: int) -> Path:
    """Close the gate at a frame; returns the file that tells which process waits there."""
    (home_folder / "gate").mkdir(parents=True, exist_ok=True)
    (home_folder / "gate" / str(number)).touch()
    return home_folder / "gate" / f"{number}.reached"


gated, slow, failing, neighbours = Gated(2), Slow(2), Failing(2), Neighbours()


def wrong_size(frames: np.ndarray) -> np.ndarray:
    """No upscaling at all."""
    return frames


wrong_size.scale = 2  # pyright: ignore[reportFunctionMemberAccess]
