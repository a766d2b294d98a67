"""Joining: the segments one behind the other in one file, with the source's sound, subtitles, chapters and title."""

import heapq
import io
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import av
from av import Packet
from av.stream import Disposition

from mlpipes.errors import ConfigError, CorruptionError
from mlpipes.store.files import Published, open_published, publishing
from mlpipes.video.chunks import UPSCALED, disk_errors, open_chunk
from mlpipes.video.encoding import CODEC, configure, open_segment, packets_in, reordering
from mlpipes.video.job import CONTAINERS, Plan, VideoJob
from mlpipes.video.probe import Track, opened

_KIND, _VERSION = "video", 1
_OF_THE_CONTAINER = {"major_brand", "minor_version", "compatible_brands", "encoder"}
_FROM_ZERO = ("mpegts", "mpeg")
"""Containers of broadcasts, whose clock starts anywhere; in the others, a late start is meant."""


def final_of(job: VideoJob) -> Published | None:
    """The finished video in the store, every byte verified; None if there is none (any more)."""
    try:
        return open_published(job.folder.final, kind=_KIND, versions=frozenset({_VERSION}))
    except (FileNotFoundError, CorruptionError):
        return None


def is_done(job: VideoJob) -> bool:
    """Whether what the job is to make is in the store."""
    if job.until == "final":
        return final_of(job) is not None
    with suppress(FileNotFoundError):
        plan, folder = Plan.read(job.folder.plan), job.folder
        return all(open_chunk(folder.upscaled_chunk(i), UPSCALED) is not None for i in range(plan.chunks))
    return False


def file_of(job: VideoJob, final: Published) -> Path:
    """The file of a finished video."""
    return final.path / f"video{job.suffix}"


def join(job: VideoJob, plan: Plan) -> Path:
    """Write and publish the finished video; returns its file.

    Raises CorruptionError if a segment is missing or the result has not as many frames as the source, DiskFullError.
    """
    target = job.folder.final
    with disk_errors(target), publishing(target, kind=_KIND, version=_VERSION) as draft:
        path = draft.path / f"video{job.suffix}"
        _write(job, plan, path)
        count = _count(path)
        if count != plan.frames:
            raise CorruptionError(f"{path} has {count} frames of {plan.frames}")
        draft.meta |= {"frames": plan.frames, "mended": plan.mended, "model": job.model.name}
    return target / f"video{job.suffix}"


def check_container(job: VideoJob) -> None:
    """Raises ConfigError, naming the stream and what to do, if the result's container cannot hold what is to be copied."""
    with closing(opened(Path(job.source.path))) as source:
        for chosen in [*((track,) for track in job.source.tracks), job.source.tracks]:
            try:
                with av.open(io.BytesIO(), "w", format=CONTAINERS[job.suffix]) as out:
                    _video(out, job)
                    for track in chosen:
                        out.add_stream_from_template(source.streams[track.index])
                    out.start_encoding()
            except (av.FFmpegError, ValueError, OSError) as error:
                what = ", ".join(f"{t.kind} stream {t.index} ({t.codec})" for t in chosen) or "H.264 of this kind"
                raise ConfigError(
                    f"a {job.suffix} file cannot hold {what} of {job.source.path}. "
                    + ("Convert it first" if job.suffix == ".mkv" else "Name the result .mkv, which holds most kinds")
                ) from error


def _write(job: VideoJob, plan: Plan, path: Path) -> None:
    options = {"fflags": "+bitexact"} | ({"movflags": "+faststart"} if job.suffix != ".mkv" else {})
    with ExitStack() as stack:
        source = stack.enter_context(closing(opened(Path(job.source.path))))
        out = stack.enter_context(av.open(str(path), "w", format=CONTAINERS[job.suffix], container_options=options))
        early = Fraction(source.start_time or 0, av.time_base) if source.format.name in _FROM_ZERO else Fraction(0)
        streams: dict[int, Any] = {}
        for index in sorted([job.source.stream, *(track.index for track in job.source.tracks)]):
            template = source.streams[index]
            made = _video(out, job) if index == job.source.stream else out.add_stream_from_template(template)
            made.metadata.update({k: v for k, v in template.metadata.items() if k not in ("encoder", "DURATION")})
            made.disposition = Disposition(template.disposition)
            streams[index] = made
        out.metadata.update({k: v for k, v in source.metadata.items() if k.lower() not in _OF_THE_CONTAINER})
        if chapters := source.chapters():
            out.set_chapters([_earlier(chapter, early) for chapter in chapters])
        out.start_encoding()
        own = streams[job.source.stream]
        delay = _check_segments(job, plan, own)
        videos = _video_packets(job, plan, own, delay, early)
        copied = _copied_packets(source, job.source.tracks, streams, early)
        for _, packet in heapq.merge(videos, copied, key=lambda timed: timed[0]):
            out.mux_one(packet)


def _video(out: Any, job: VideoJob) -> Any:
    """The stream of the result, with an encoder that is opened for its header and encodes nothing."""
    stream = out.add_stream(CODEC, rate=Fraction(*job.source.rate) or 25)
    configure(stream.codec_context, job)
    stream.time_base = Fraction(*job.source.time_base)
    if job.source.display:
        stream.set_display_matrix(
            [*job.source.display[:6], *(job.model.scale * n for n in job.source.display[6:8]), 1 << 30]
        )
    return stream


def _segments(job: VideoJob, plan: Plan, *, verify: bool) -> Iterator[Published]:
    """One after the other: of a long video, the lists of all packets together are not small."""
    for index in range(plan.segments):
        segment = open_segment(job, index, verify=verify)
        if segment is None:
            raise CorruptionError(f"{job.folder.segment(index)} is missing, or was corrupt; it is made again")
        yield segment


def _check_segments(job: VideoJob, plan: Plan, stream: Any) -> int:
    """Verify all segments; returns by how many frames decoding runs ahead of showing in any of them."""
    header, delay = (stream.codec_context.extradata or b"").hex(), 0
    for segment in _segments(job, plan, verify=True):
        if segment.meta["extradata"] != header:
            raise CorruptionError(f"{segment.path} was encoded with other settings than the others; remove it")
        delay = max(delay, reordering(segment))
    return delay


def _video_packets(
    job: VideoJob, plan: Plan, stream: Any, delay: int, early: Fraction
) -> Iterator[tuple[Fraction, Packet]]:
    """The packets of all segments, decoded at times that rise throughout: when `delay` frames earlier are shown."""
    base, step = Fraction(*job.source.time_base), _step(job)
    shift, decoded = round(early / base), _times_of_decoding(job, plan, delay, step)
    for segment in _segments(job, plan, verify=False):
        lengths = dict(_durations(segment, step))
        for data, encoded in packets_in(segment):
            dts, packet = next(decoded), Packet(data)
            packet.stream, packet.time_base = stream, base
            packet.pts, packet.dts, packet.is_keyframe = encoded.pts - shift, dts - shift, encoded.key
            packet.duration = lengths[encoded.pts]
            yield dts * base - early, packet


def _times_of_decoding(job: VideoJob, plan: Plan, delay: int, step: int) -> Iterator[int]:
    """The times at which frames are shown, behind `delay` earlier ones that are as far apart as the first two."""
    shown = (pts for segment in _segments(job, plan, verify=False) for pts, _ in segment.meta["times"])
    first = list(islice(shown, 2))
    step = first[1] - first[0] if len(first) > 1 else step
    yield from (first[0] - step * n for n in range(delay, 0, -1))
    yield from first
    yield from shown


def _durations(segment: Published, fallback: int) -> Iterator[tuple[int, int]]:
    """For how long each frame of a segment is shown: until the next one, and the last one as long as the source says."""
    times = segment.meta["times"]
    for (pts, _), (following, _) in pairwise(times):
        yield pts, following - pts
    pts, duration = times[-1]
    yield pts, duration or (pts - times[-2][0] if len(times) > 1 else fallback)


def _step(job: VideoJob) -> int:
    rate, base = Fraction(*job.source.rate), Fraction(*job.source.time_base)
    return max(1, round(1 / (rate * base))) if rate else 1


def _copied_packets(
    source: Any, tracks: tuple[Track, ...], streams: dict[int, Any], early: Fraction
) -> Iterator[tuple[Fraction, Packet]]:
    """The packets of the streams that are copied, as they lie in the file."""
    if not tracks:
        return
    last: dict[int, int] = {}
    latest = Fraction(-(1 << 40))
    for packet in source.demux([source.streams[track.index] for track in tracks]):
        if packet.size == 0:  # PyAV's sign for the end of a stream
            continue
        index, base = packet.stream_index, packet.time_base
        shift = round(early / base)
        given, least = packet.dts if packet.dts is not None else packet.pts, last.get(index, -1) + 1
        dts = least if given is None else given - shift
        if index in last:
            dts = max(dts, least)  # a muxer takes rising times only
        packet.pts = max(packet.pts - shift, dts) if packet.pts is not None else dts
        packet.dts = last[index] = dts
        packet.stream = streams[index]
        latest = max(latest, dts * base)  # what is merged must be sorted
        yield latest, packet


def _earlier(chapter: Any, early: Fraction) -> Any:
    shift = round(early / chapter["time_base"]) if chapter["time_base"] else 0
    return {**chapter, "start": chapter["start"] - shift, "end": chapter["end"] - shift}


def _count(path: Path) -> int:
    with closing(opened(path)) as container:
        return sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)
