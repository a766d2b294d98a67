"""Encoding: the result in segments of 250 frames, each by a fresh encoder of constant quality and one thread.

So a segment's bytes depend on its frames alone: not on the length of chunks, on who encodes it, or on what was killed
before. A segment begins with a key frame that nothing before it is needed for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
from av import Packet, VideoFrame
from av.codec.context import Flags

from mlpipes.errors import CorruptionError
from mlpipes.store.files import Published, publishing
from mlpipes.video.chunks import UPSCALED, disk_errors, frames_in, need_chunk, open_chunk, times_of
from mlpipes.video.job import SEGMENT, Plan, VideoJob

CODEC = "libx264"
SEGMENT_KIND, _VERSION, _FILE = "video segment", 1, "packets.h264"
_FALLBACK_RATE = Fraction(25)


@dataclass(frozen=True)
class Encoded:
    """A packet of a segment: where it lies in the file, and when its frame is shown."""

    size: int
    pts: int
    key: bool


def configure(context: Any, job: VideoJob) -> None:
    """Set all that an encoder of a job's result needs; the same for a segment and for the header of the whole."""
    source, colour = job.source, job.source.colour
    context.width, context.height, context.pix_fmt = job.width, job.height, job.pix_fmt
    context.time_base = Fraction(*source.time_base)
    context.framerate = Fraction(*source.rate) or _FALLBACK_RATE
    context.sample_aspect_ratio = Fraction(*source.aspect)
    context.colorspace, context.color_range = colour.matrix, int(colour.range)
    context.color_primaries, context.color_trc = colour.primaries, colour.transfer
    context.thread_count = 1  # another number makes other bytes
    context.flags |= Flags.bitexact | Flags.global_header
    context.options = {
        "preset": job.encoding.preset,
        "crf": str(job.encoding.crf),
        "x264-params": f"keyint={SEGMENT}:open-gop=0:threads=1:lookahead-threads=1:sliced-threads=0",
    }


def encode_segment(job: VideoJob, plan: Plan, index: int) -> int:
    """Encode and publish one segment; returns the number of frames, 0 if it is there already.

    Raises CorruptionError if a chunk is missing or corrupt, and DiskFullError.
    """
    target = job.folder.segment(index)
    if open_segment(job, index) is not None:
        return 0
    frames = plan.frames_of_segment(index)
    times = times_of(job, plan, frames)
    context: Any = av.CodecContext.create(CODEC, "w")
    configure(context, job)
    listed: list[list[int]] = []
    with (
        disk_errors(target),
        publishing(target, kind=SEGMENT_KIND, version=_VERSION) as draft,
        (draft.path / _FILE).open("wb") as stream,
    ):
        for packet in _packets(context, job, plan, frames, times):
            listed.append([packet.size, packet.pts or 0, int(packet.is_keyframe)])
            stream.write(bytes(packet))
        stream.flush()
        if sorted(pts for _, pts, _ in listed) != [pts for pts, _ in times]:
            raise CorruptionError(f"{target}: {len(listed)} packets came of {len(times)} frames, or with other times")
        draft.meta |= {
            "first": frames.start,
            "frames": len(frames),
            "times": times,
            "packets": listed,
            "extradata": (context.extradata or b"").hex(),
        }
    return len(frames)


def _packets(context: Any, job: VideoJob, plan: Plan, frames: range, times: list[tuple[int, int]]) -> Iterator[Packet]:
    base = Fraction(*job.source.time_base)
    for frame, (pts, _) in zip(_frames(job, plan, frames), times, strict=True):
        frame.pts, frame.time_base, frame.pict_type = pts, base, 0
        yield from context.encode(frame)
    yield from context.encode(None)


def _frames(job: VideoJob, plan: Plan, frames: range) -> Iterator[VideoFrame]:
    for index in range(frames.start // plan.chunk, (frames.stop - 1) // plan.chunk + 1):
        chunk = need_chunk(job.folder.upscaled_chunk(index), UPSCALED)
        for number, frame in enumerate(frames_in(chunk), index * plan.chunk):
            if number in frames:
                yield frame


def open_segment(job: VideoJob, index: int, *, verify: bool = True) -> Published | None:
    """A segment; None if it is not there, also because it was corrupt, and is quarantined now."""
    return open_chunk(job.folder.segment(index), SEGMENT_KIND, verify=verify)


def packets_in(segment: Published) -> Iterator[tuple[bytes, Encoded]]:
    """The packets of a segment in the order of decoding."""
    with (segment.path / _FILE).open("rb") as stream:
        for size, pts, key in segment.meta["packets"]:
            yield stream.read(size), Encoded(size, pts, bool(key))


def reordering(segment: Published) -> int:
    """By how many frames the order of decoding runs ahead of that of showing, at most."""
    shown = {pts: n for n, pts in enumerate(sorted(pts for _, pts, _ in segment.meta["packets"]))}
    return max((n - shown[pts] for n, (_, pts, _) in enumerate(segment.meta["packets"])), default=0)
