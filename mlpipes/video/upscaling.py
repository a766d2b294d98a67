"""Upscaling of a chunk: its frames, and neighbours from the chunks beside it, through a model in batches of one size."""

from collections import deque
from collections.abc import Iterator

import numpy as np
from av import VideoFrame

from mlpipes.errors import ConfigError
from mlpipes.video.chunks import SOURCE, UPSCALED, frames_in, need_chunk, open_chunk, publish_frames
from mlpipes.video.colour import Converter
from mlpipes.video.job import BATCH, Plan, VideoJob
from mlpipes.video.models import Upscaler


def upscale_chunk(job: VideoJob, plan: Plan, index: int, model: Upscaler) -> int:
    """Upscale and publish one chunk; returns the number of frames made, 0 if it is there already.

    Raises CorruptionError if a source chunk is missing or corrupt, DiskFullError, and ConfigError if the model answers with
    something else than frames of its scale.
    """
    target = job.folder.upscaled_chunk(index)
    if open_chunk(target, UPSCALED) is not None:
        return 0
    return publish_frames(target, UPSCALED, _upscaled(job, plan, index, model), {"first": index * plan.chunk})


def _upscaled(job: VideoJob, plan: Plan, index: int, model: Upscaler) -> Iterator[VideoFrame]:
    convert = Converter(job.source.colour)
    for batch in _batches(_windows(job, plan, index, convert)):
        stacked = np.stack(batch)
        # The last batch of a video is filled up: kernels may round differently in a smaller one.
        if len(batch) < BATCH:
            stacked = np.concatenate([stacked, np.repeat(stacked[-1:], BATCH - len(batch), axis=0)])
        made = model(stacked)
        wanted = (BATCH, job.height, job.width, 3)
        if made.shape != wanted or made.dtype != np.uint8:
            raise ConfigError(
                f"the model {job.model.name} answered with {made.dtype} {list(made.shape)} to {list(stacked.shape)}; "
                f"expected uint8 {list(wanted)}"
            )
        for image in made[: len(batch)]:
            yield convert.from_rgb(image, job.pix_fmt)


def _batches(frames: Iterator[np.ndarray]) -> Iterator[list[np.ndarray]]:
    batch: list[np.ndarray] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _windows(job: VideoJob, plan: Plan, index: int, convert: Converter) -> Iterator[np.ndarray]:
    """Each frame of a chunk as RGB; with its neighbours [T, H, W, 3], the first and last of the video repeated."""
    if job.model.frames == 1:
        yield from (convert.to_rgb(frame) for frame in _source(job, index))
        return
    reach = job.model.frames // 2
    first, stop = index * plan.chunk, min((index + 1) * plan.chunk, plan.frames)
    window: deque[np.ndarray] = deque(maxlen=job.model.frames)
    for number, image in _around(job, plan, first - reach, stop + reach, convert):
        before = max(0, reach - first) if number == 0 else 0
        behind = max(0, stop + reach - plan.frames) if number == plan.frames - 1 else 0
        for _ in range(before + 1 + behind):
            window.append(image)
            if len(window) == job.model.frames:
                yield np.stack(window)


def _around(job: VideoJob, plan: Plan, start: int, stop: int, convert: Converter) -> Iterator[tuple[int, np.ndarray]]:
    """The frames from `start` to before `stop` that there are, by number, of as many chunks as it takes."""
    start, stop = max(0, start), min(stop, plan.frames)
    for index in range(start // plan.chunk, (stop - 1) // plan.chunk + 1):
        for number, frame in enumerate(_source(job, index), index * plan.chunk):
            if start <= number < stop:
                yield number, convert.to_rgb(frame)


def _source(job: VideoJob, index: int) -> Iterator[VideoFrame]:
    return frames_in(need_chunk(job.folder.source_chunk(index), SOURCE))
