"""Chunks: frames kept lossless in the store (FFV1, each slice with its checksum), published whole or not at all.

The source is cut once, in order, so that every later reader finds its frames without seeking in a file that may have one
key frame in ten thousand, open groups of pictures or no times at all.
"""

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av import VideoFrame

from mlpipes.errors import CorruptionError, DataError, DiskFullError
from mlpipes.store.files import Draft, Published, open_published, publishing, quarantine
from mlpipes.video.colour import Converter
from mlpipes.video.job import Plan, VideoFolder, VideoJob
from mlpipes.video.reading import frames_of

_FILE, _VERSION = "frames.mkv", 1
_TICKS = 1000  # a second; Matroska's own. When a frame is shown is said in the manifest.
_OPTIONS = {"level": "3", "slicecrc": "1", "slices": "4", "g": "1"}
SOURCE, UPSCALED = "video source chunk", "video upscaled chunk"


def publish_frames(target: Path, kind: str, frames: Iterable[VideoFrame], meta: dict[str, Any]) -> int:
    """Write frames of one size and format as a chunk; returns how many. Raises DiskFullError."""
    with disk_errors(target), publishing(target, kind=kind, version=_VERSION) as draft:
        return _write(draft, frames, meta)


def _write(draft: Draft, frames: Iterable[VideoFrame], meta: dict[str, Any]) -> int:
    count, stream = 0, None
    with av.open(
        str(draft.path / _FILE), "w", format="matroska", container_options={"fflags": "+bitexact"}
    ) as container:
        for count, frame in enumerate(frames, 1):
            if stream is None:
                stream = container.add_stream("ffv1", rate=_TICKS, options=_OPTIONS)
                stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, frame.format.name
                stream.codec_context.thread_count, stream.codec_context.time_base = 1, Fraction(1, _TICKS)
            frame.pts, frame.time_base, frame.pict_type = count - 1, Fraction(1, _TICKS), 0
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode(None))
    draft.meta |= {**meta, "frames": count}
    return count


def open_chunk(path: Path, kind: str, *, verify: bool = True) -> Published | None:
    """A chunk; None if it is not there, also because it was corrupt, and is quarantined now."""
    try:
        return open_published(path, kind=kind, versions=frozenset({_VERSION}), verify=verify)
    except FileNotFoundError:
        return None
    except CorruptionError:
        quarantine(path)
        return None


def need_chunk(path: Path, kind: str) -> Published:
    """A chunk, every byte verified. Raises CorruptionError if it is not there (any more)."""
    if (found := open_chunk(path, kind)) is None:
        raise CorruptionError(f"{path} is missing, or was corrupt and is quarantined; it is made again")
    return found


def frames_in(chunk: Published) -> Iterator[VideoFrame]:
    """The frames of a chunk that was opened. Raises CorruptionError if they are not as many as it says."""
    count = 0
    with av.open(str(chunk.path / _FILE)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            count += 1
            yield frame
    if count != chunk.meta["frames"]:
        raise CorruptionError(f"{chunk.path} holds {count} frames, its manifest says {chunk.meta['frames']}")


def cut(job: VideoJob, report: Callable[[int], None] = lambda _: None) -> Plan:
    """Cut the source into chunks, and say how many there are; what is there already is not written again.

    `report` is told the number of frames read. Raises DataError for a source that is damaged or has changed.
    """
    folder = job.folder
    try:
        plan = Plan.read(folder.plan)
    except (FileNotFoundError, CorruptionError):
        plan = None
    if plan is not None and all(
        open_chunk(folder.source_chunk(i), SOURCE, verify=False) is not None for i in range(plan.chunks)
    ):
        return plan
    job.source.check_unchanged()
    cutter = _Cutter(job, folder)
    for number in cutter.pass_through():
        report(number)
    job.source.check_unchanged()
    plan = Plan(frames=cutter.frames, chunk=job.chunk, mended=cutter.mended)
    plan.write_to(folder.plan)
    return plan


class _Cutter:
    """Reads the source once; every `job.chunk` frames become a chunk."""

    def __init__(self, job: VideoJob, folder: VideoFolder) -> None:
        self.job, self.folder, self.frames, self.mended = job, folder, 0, 0
        self.convert = Converter(job.source.colour)

    def pass_through(self) -> Iterator[int]:
        """Cut; yields the number of frames after each chunk."""
        source, index, pending = iter(frames_of(self.job.source)), 0, None
        pending = next(source, None)
        while pending is not None:
            times: list[tuple[int, int]] = []
            first = pending

            def these(first: Any = first, times: list[tuple[int, int]] = times) -> Iterator[VideoFrame]:
                timed: Any = first
                while timed is not None:
                    times.append((timed.pts, timed.duration))
                    self.mended += timed.mended
                    yield self.convert.planar(timed.frame)
                    timed = next(source, None) if len(times) < self.job.chunk else None

            target = self.folder.source_chunk(index)
            meta: dict[str, Any] = {"first": self.frames, "times": times}
            if open_chunk(target, SOURCE, verify=False) is not None:
                for _ in these():  # decoded only: what follows needs it
                    pass
            else:
                publish_frames(target, SOURCE, these(), meta)
            self.frames += len(times)
            index += 1
            yield self.frames
            pending = next(source, None) if len(times) == self.job.chunk else None


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what a full disk makes FFmpeg and Python say into DiskFullError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"the disk of {path.parent} is full. Make room, and give the same command again: it goes on where it stopped"
        ) from error


def times_of(job: VideoJob, plan: Plan, frames: range) -> list[tuple[int, int]]:
    """When frames are shown and for how long, in ticks of the source; the last one of all for as long as the source says."""
    found: list[tuple[int, int]] = []
    for index in range(frames.start // plan.chunk, -(-frames.stop // plan.chunk)):
        chunk = open_chunk(job.folder.source_chunk(index), SOURCE, verify=False)
        if chunk is None:
            raise CorruptionError(f"{job.folder.source_chunk(index)} is missing; it is cut again at the next attempt")
        first = chunk.meta["first"]
        found += [(pts, duration) for n, (pts, duration) in enumerate(chunk.meta["times"], first) if n in frames]
    if len(found) != len(frames):
        raise DataError(f"{job.folder.path}: times of {len(found)} frames where {len(frames)} were to be")
    return found
