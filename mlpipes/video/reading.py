"""Reading: the frames of a video one after the other, in the order in which they are shown, each with its time."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av import VideoFrame

from mlpipes.errors import DataError
from mlpipes.video.probe import INTERLACED, Source, opened

_THREADS = 2
_TOLERATED_SECONDS = Fraction(1, 2)
"""By which what a container says of a video's length may be wrong."""


@dataclass(frozen=True)
class Timed:
    """A frame and when it is shown."""

    frame: VideoFrame
    pts: int
    """In the source's time base; greater than that of the frame before."""
    duration: int
    """As the source says; 0 where it does not."""
    mended: bool
    """Whether the source's own time was missing or not greater than the one before."""


def frames_of(source: Source) -> Iterator[Timed]:
    """All frames of a video, decoded from the beginning; one is in memory at a time, and what the codec keeps.

    Nothing is sought: open groups of pictures, edit lists and files with one key frame are read as players show them.
    Raises DataError, saying where, for a frame that is damaged, interlaced or of another size than the first.
    """
    path = Path(source.path)
    step = _step(source)
    number, last, end = 0, None, Fraction(0)
    with closing(opened(path)) as container:
        stream = container.streams[source.stream]
        stream.thread_count, stream.thread_type = _THREADS, "AUTO"
        try:
            for frame in container.decode(stream):
                _check(frame, source, number)
                pts, mended = _time(frame.pts, last, step)
                yield Timed(frame, pts, frame.duration or 0, mended)
                number, last, end = number + 1, pts, (pts + (frame.duration or step)) * Fraction(*source.time_base)
        except (av.FFmpegError, OSError) as error:
            where = f"behind frame {number}" if number else "at its beginning"
            raise DataError(
                f"{path} is damaged {where}: {getattr(error, 'strerror', None) or error}. Copy it again, or repair it"
            ) from error
    if number == 0:
        raise DataError(f"{path} holds a video stream without a frame that can be decoded")
    if end + _TOLERATED_SECONDS < source.said_seconds:
        raise DataError(
            f"{path} is damaged or cut off: its last frame ends at {float(end):.2f} s, and it says that it is "
            f"{source.said_seconds:.2f} s long. Copy it again; if there is no more of it, copy its streams to a new file"
        )


def _time(pts: int | None, last: int | None, step: int) -> tuple[int, bool]:
    """When a frame is shown, and whether that had to be made up: it is missing, or not later than the one before."""
    if pts is None:
        return (0 if last is None else last + step), True
    return (pts, False) if last is None or pts > last else (last + 1, True)


def _step(source: Source) -> int:
    """Ticks from a frame to the next at the source's rate; 1 where that is not known."""
    rate, base = Fraction(*source.rate), Fraction(*source.time_base)
    return max(1, round(1 / (rate * base))) if rate else 1


def _check(frame: VideoFrame, source: Source, number: int) -> None:
    where = f"{source.path}: frame {number}"
    if frame.is_corrupt:
        raise DataError(f"{where} is damaged. Copy the file again, or repair it")
    if frame.interlaced_frame:
        raise DataError(f"{where}: {INTERLACED}")
    found = (frame.width, frame.height, frame.format.name)
    if found != (source.width, source.height, source.pix_fmt):
        raise DataError(
            f"{where} is {found[0]}×{found[1]} {found[2]}, and the file began as {source.width}×{source.height} "
            f"{source.pix_fmt}: a video that changes its size cannot be upscaled; cut it there"
        )
