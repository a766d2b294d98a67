"""Disk: how much room a video's chunks and segments need, measured on its first frames before anything is started."""

import shutil
import tempfile
from itertools import islice
from pathlib import Path

from mlpipes.errors import PreflightError
from mlpipes.video.chunks import SOURCE, publish_frames
from mlpipes.video.colour import Converter
from mlpipes.video.job import VideoJob
from mlpipes.video.models import Bicubic
from mlpipes.video.probe import Source, opened
from mlpipes.video.reading import frames_of

_SAMPLE = 4
_CAUTION = 1.5
"""Later frames may be harder to compress than the first ones, and a network's are sharper than bicubic's."""
_FALLBACK_FRAMES = 100_000
GIB = 1024**3


def expected_frames(source: Source) -> int:
    """How many frames a video has, as its container says or as its length and rate tell; 0 where nothing does."""
    if source.expected_frames:
        return source.expected_frames
    container = opened(Path(source.path))
    try:
        seconds = (container.duration or 0) / 1_000_000
    finally:
        container.close()
    return round(seconds * source.rate[0] / source.rate[1])


def needed_bytes(job: VideoJob) -> int:
    """What the parts of a video take on disk while it is made, by its first frames."""
    convert, upscale, folder = Converter(job.source.colour), Bicubic(job.model.scale), None
    first = [timed.frame for timed in islice(frames_of(job.source), _SAMPLE)]
    with tempfile.TemporaryDirectory(prefix="mlpipes-video-") as scratch:
        sizes = []
        for name, frames in (
            ("source", [convert.planar(frame) for frame in first]),
            ("upscaled", [convert.from_rgb(upscale(convert.to_rgb(f)[None])[0], job.pix_fmt) for f in first]),
        ):
            folder = Path(scratch) / name
            publish_frames(folder, SOURCE, frames, {})
            sizes.append(sum(path.stat().st_size for path in folder.iterdir()) / len(first))
    # A segment and the finished video are each at most a third of what is kept lossless.
    per_frame = sum(sizes) + 2 * sizes[1] / 3
    return round(_CAUTION * per_frame * (expected_frames(job.source) or _FALLBACK_FRAMES))


def check_disk(job: VideoJob) -> int:
    """What it will take. Raises PreflightError if the disk of the store has not as much."""
    needed, place = needed_bytes(job), job.folder.path
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    done = sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) if place.exists() else 0
    free = shutil.disk_usage(there).free
    if free < needed - done:
        raise PreflightError(
            f"the disk of {there} has {free / GIB:.2f} GiB free, and {Path(job.source.path).name} needs about "
            f"{(needed - done) / GIB:.2f} GiB while it is made. Make room, or set MLPIPES_HOME to a larger disk. Nothing "
            "was started."
        )
    return needed
