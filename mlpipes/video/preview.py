"""The preview: source (made as large by bicubic) and result side by side, as a picture and, if asked for, as a clip."""

import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from mlpipes.errors import CorruptionError
from mlpipes.store.files import Published, open_published, publishing
from mlpipes.video.chunks import SOURCE, UPSCALED, disk_errors, frames_in, need_chunk
from mlpipes.video.colour import Converter
from mlpipes.video.job import Plan, VideoJob
from mlpipes.video.models import Bicubic
from mlpipes.video.pool import preview_chunk

_KIND, _VERSION = "video preview", 1
PICTURE, CLIP = "preview.png", "preview.mp4"
_PICTURE_SIDE = 480
"""Of what the picture shows of each, at most, in pixels of the result."""
_LINE = 4


def preview_of(job: VideoJob) -> Published | None:
    """The preview, if there is one with all that is asked for."""
    try:
        found = open_published(job.folder.preview, kind=_KIND, versions=frozenset({_VERSION}))
    except (FileNotFoundError, CorruptionError):
        return None
    return found if CLIP in found.files or not job.preview else None


def make_preview(job: VideoJob, plan: Plan) -> None:
    """Publish the preview of the middle chunk. Raises CorruptionError if that is not there."""
    if preview_of(job) is not None:
        return
    target = job.folder.preview
    if target.exists():  # without the clip, which is asked for now
        shutil.rmtree(target)
    with disk_errors(target), publishing(target, kind=_KIND, version=_VERSION) as draft:
        pairs = _pairs(job, plan)
        before, after = _write_clip(draft.path / CLIP, job, pairs) if job.preview else next(pairs)
        rows, columns = _busiest(after)
        Image.fromarray(_beside(before[rows, columns], after[rows, columns])).save(draft.path / PICTURE)


def _pairs(job: VideoJob, plan: Plan) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Frames of the middle chunk: as large by bicubic, and upscaled."""
    index, convert, bicubic = preview_chunk(plan), Converter(job.source.colour), Bicubic(job.model.scale)
    # The result is YUV also where the source is not.
    back = Converter(job.source.colour.model_copy(update={"rgb": False}))
    sources = frames_in(need_chunk(job.folder.source_chunk(index), SOURCE))
    results = frames_in(need_chunk(job.folder.upscaled_chunk(index), UPSCALED))
    for before, after in zip(sources, results, strict=True):
        yield bicubic(convert.to_rgb(before)[None])[0], back.to_rgb(after)


def _beside(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    line = np.full((left.shape[0], _LINE, 3), 255, np.uint8)
    return np.concatenate([left, line, right], axis=1)


def _busiest(image: np.ndarray) -> tuple[slice, slice]:
    """Where an image has most to look at: the part with the greatest variance."""
    height, width = (min(side, _PICTURE_SIDE) for side in image.shape[:2])
    parts = [
        (slice(top, top + height), slice(left, left + width))
        for top in range(0, image.shape[0] - height + 1, max(1, height // 2))
        for left in range(0, image.shape[1] - width + 1, max(1, width // 2))
    ]
    return max(parts, key=lambda part: image[part].var())


def _write_clip(
    path: Path, job: VideoJob, pairs: Iterator[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Write the clip; returns its first pair."""
    first, stream, rate = None, None, Fraction(*job.source.rate) or Fraction(25)
    with av.open(str(path), "w", container_options={"fflags": "+bitexact"}) as container:
        for pair in pairs:
            image = _beside(*pair)
            image = image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2]
            if stream is None:
                first = pair
                stream = container.add_stream("libx264", rate=rate, options={"crf": "16", "preset": "veryfast"})
                stream.width, stream.height, stream.pix_fmt = image.shape[1], image.shape[0], "yuv420p"
                stream.codec_context.thread_count = 1
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        assert stream is not None  # noqa: S101 - a chunk has a frame
        container.mux(stream.encode(None))
    assert first is not None  # noqa: S101
    return first
