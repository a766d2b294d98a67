"""Videos that tests make for themselves, and the way from one to its result in this process, without Ray."""

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from mlpipes.store.files import sha256_file
from mlpipes.store.layout import Store
from mlpipes.video.chunks import cut
from mlpipes.video.encoding import encode_segment
from mlpipes.video.job import Encoding, VideoJob, chunk_length, suffix_of
from mlpipes.video.joining import check_container, join
from mlpipes.video.models import load, pin
from mlpipes.video.probe import probe
from mlpipes.video.upscaling import upscale_chunk

WIDTH, HEIGHT = 64, 48
QUICK = Encoding(preset="ultrafast", crf=4)
Pts = Callable[[int], int]


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A smooth pattern that moves, and that has the frame's number in it: see `number_in`."""
    y, x = np.mgrid[0:height, 0:width]
    wave = 127 + 60 * np.sin((x + 2 * number) / 9) + 40 * np.cos((y - number) / 7)
    image = np.stack([wave, np.roll(wave, 7, 1), 255 - wave], -1).clip(0, 255).astype(np.uint8)
    for bit in range(8):  # eight blocks along the top: the number in binary
        image[: height // 3, bit * width // 8 : (bit + 1) * width // 8] = 235 if number >> bit & 1 else 20
    return image


def number_in(image: np.ndarray) -> int:
    """The number of a frame that `picture` made, whatever was done to its size."""
    width, row = image.shape[1], image.shape[0] // 6
    block = width / 8
    return sum(int(image[row, int((bit + 0.5) * block)].mean() > 127) << bit for bit in range(8))


def write_video(
    path: Path,
    frames: int | Iterable[np.ndarray] = 12,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: Fraction | int = 25,
    time_base: Fraction | None = None,
    pts: Pts | None = None,
    options: dict[str, str] | None = None,
    audio: Sequence[dict[str, Any]] = (),
    subtitles: Sequence[str] = (),
    size: tuple[int, int] = (WIDTH, HEIGHT),
    tune: Callable[[Any, Any], None] = lambda container, stream: None,
    rgb: str = "rgb24",
) -> Path:
    """Write a video; `pts` gives the tick of each frame, `audio` names streams (codec, rate, start in seconds, language)."""
    images = [picture(n, *size) for n in range(frames)] if isinstance(frames, int) else list(frames)
    base = time_base or Fraction(1, 1) / Fraction(rate)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(
            codec, rate=rate, options={"crf": "4", "preset": "ultrafast"} | (options or {})
        )
        stream.width, stream.height, stream.pix_fmt = (*size, pix_fmt)
        stream.codec_context.time_base, stream.time_base = base, base
        stream.codec_context.thread_count = 1
        tune(container, stream)
        sounds = [_sound(container, **about) for about in audio]
        texts = [_text(container, name) for name in subtitles]
        container.start_encoding()
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format=rgb)
            frame.pts, frame.time_base = (pts or (lambda n: n))(number), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        seconds = float(len(images) / Fraction(rate))
        for (sound, start), about in zip(sounds, audio, strict=True):
            _tone(container, sound, start, seconds, about.get("hertz", 440))
        for text in texts:
            for n in range(2):
                packet = av.Packet(b"\0\6text %d" % n if "mp4" in container.format.name else b"text %d" % n)
                packet.stream, packet.time_base = text, Fraction(1, 1000)
                packet.pts = packet.dts = 100 * n
                packet.duration = 80
                container.mux(packet)
    return path


def _sound(
    container: Any, codec: str = "aac", rate: int = 48000, start: float = 0.0, language: str = "und", hertz: int = 440
) -> tuple[Any, float]:
    stream = container.add_stream(codec, rate=rate)
    stream.codec_context.layout = "mono"
    if codec == "wavpack":
        stream.codec_context.format = "s16p"
    stream.metadata["language"] = language
    return stream, start


def _text(container: Any, language: str) -> Any:
    stream = container.add_mux_stream("mov_text" if "mp4" in container.format.name else "subrip")
    stream.time_base = Fraction(1, 1000)
    stream.metadata["language"] = language
    return stream


def _tone(container: Any, stream: Any, start: float, seconds: float, hertz: int) -> None:
    rate = stream.codec_context.sample_rate
    format_ = stream.codec_context.format.name
    for first in range(0, int(rate * seconds), 1024):
        wave = np.sin(2 * np.pi * hertz * (np.arange(first, first + 1024) / rate)) * 0.3
        made = wave.astype(np.float32)[None] if format_.startswith("flt") else (wave * 32000).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(made, format=format_, layout="mono")
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        frame.pts = first + int(start * rate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def job_of(path: Path, store: Path, suffix: str = ".mp4", *, scale: int = 2, chunk: int = 8, **more: Any) -> VideoJob:
    """What `mlpipes upscale` would do, with a model that needs no training unless `model` names another."""
    source = probe(path)
    return VideoJob(
        source=source,
        source_digest=sha256_file(path),
        model=pin(more.pop("model", "bicubic"), scale, Store(store)),
        encoding=more.pop("encoding", QUICK),
        suffix=suffix_of(Path(f"x{suffix}")),
        store=str(store),
        chunk=chunk_length(chunk),
        workers=1,
        **more,
    )


def upscale_here(path: Path, store: Path, suffix: str = ".mp4", **more: Any) -> Path:
    """The result, made in this process, one part after the other."""
    job = job_of(path, store, suffix, **more)
    check_container(job)
    plan, model = cut(job), load(job.model, Store(Path(job.store)))
    for index in range(plan.chunks):
        upscale_chunk(job, plan, index, model)
    for index in range(plan.segments):
        encode_segment(job, plan, index)
    return join(job, plan)


def images_of(path: Path) -> list[np.ndarray]:
    """All frames as RGB, as they are shown but for their rotation."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def times_of(path: Path) -> list[Fraction]:
    """When the frames are shown, in seconds."""
    with av.open(str(path)) as container:
        return [(frame.pts or 0) * Fraction(frame.time_base or 1) for frame in container.decode(video=0)]


def packets_of(path: Path, kind: str) -> list[list[tuple[Fraction, bytes]]]:
    """Of each stream of a kind, its packets with their times; less the empty texts that MP4 has between others."""
    with av.open(str(path)) as container:
        streams = [stream for stream in container.streams if stream.type == kind]
        found: dict[int, list[tuple[Fraction, bytes]]] = {stream.index: [] for stream in streams}
        for packet in container.demux(streams) if streams else ():
            if packet.size and not (kind == "subtitle" and bytes(packet) == b"\0\0"):
                found[packet.stream_index].append(((packet.pts or 0) * Fraction(packet.time_base), bytes(packet)))
        return list(found.values())
