"""What a file is: its streams, size, colour, timing; and whether it can be upscaled, said before anything is started."""

import struct
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.stream import Disposition
from pydantic import BaseModel, ConfigDict

from mlpipes.errors import DataError
from mlpipes.store.record import Record
from mlpipes.video.colour import SUBSAMPLING, UNSPECIFIED, Colour, colour_of

_PROGRESSIVE = (0, 1)  # unknown, and progressive
_COPIED = ("audio", "subtitle")
_LOOKED_AT = 8
"""Frames decoded by a probe: enough for what only frames tell, such as a display matrix."""


class Track(BaseModel):
    """A stream that is copied as it is."""

    model_config = ConfigDict(frozen=True)

    index: int
    kind: str
    codec: str
    language: str = ""


class Source(Record):
    """A video file that can be upscaled."""

    path: str
    bytes: int
    modified_ns: int
    format: str
    """FFmpeg's name of the container."""
    stream: int
    """Index of the video stream that is upscaled."""
    codec: str
    width: int
    height: int
    pix_fmt: str
    colour: Colour
    time_base: tuple[int, int]
    rate: tuple[int, int]
    """Frames a second, on average; (0, 1) where it is not known."""
    aspect: tuple[int, int] = (1, 1)
    """Width to height of a sample; (1, 1) where it is not said."""
    display: tuple[int, ...] = ()
    """The display matrix (nine numbers, as in MP4) by which players turn the picture; empty where they do not."""
    expected_frames: int = 0
    """As the container says, which may be wrong; 0 where it does not say."""
    said_seconds: float = 0.0
    """When the video ends, as a container says whose index does not; 0 where it does not say."""
    tracks: tuple[Track, ...] = ()
    notes: tuple[str, ...] = ()
    """What somebody should know: streams that are left out, an order of fields that is not known."""

    @property
    def rotation(self) -> int:
        """By how many degrees players turn the picture, counter-clockwise."""
        if not self.display:
            return 0
        a, b = self.display[0], self.display[1]
        return {(1, 0): 0, (0, 1): -90, (-1, 0): 180, (0, -1): 90}.get(((a > 0) - (a < 0), (b > 0) - (b < 0)), 0)

    def check_unchanged(self) -> None:
        """Raises DataError if the file is another one by now, or grows."""
        _, size, modified = _stat(Path(self.path))
        if (size, modified) != (self.bytes, self.modified_ns):
            raise DataError(
                f"{self.path} has changed since it was looked at; wait until it is written, and start again"
            )


def probe(path: Path) -> Source:
    """Look at a file: its head and first frames. Raises DataError, naming the file and what to do, if it is no good."""
    path, size, modified = _stat(path)
    with opened(path) as container:
        notes: list[str] = []
        stream = _video_stream(path, container, notes)
        try:
            source = _source(path, container, stream, notes)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
    return source.model_copy(update={"bytes": size, "modified_ns": modified})


def opened(path: Path) -> Any:
    """The file, opened by FFmpeg's demuxer. Raises DataError if that cannot read it."""
    try:
        # Only from this disk: a playlist must not have other files or addresses read.
        return av.open(str(path), container_options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DataError(
            f"{path} is no video that can be read: {_said(error)}. If it was copied or downloaded, compare its size"
        ) from error


def _stat(path: Path) -> tuple[Path, int, int]:
    path = path.expanduser().absolute()
    if "%" in path.name and not path.exists():
        raise DataError(f"{path} names a sequence of images; make a video of them first, and say its rate")
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a video file. Of images, make a video first, and say its rate")
    if not path.is_file():
        raise DataError(f"{path} is no regular file; save the video to one first")
    if not found.st_size:
        raise DataError(f"{path} is empty")
    return path, found.st_size, found.st_mtime_ns


def _video_stream(path: Path, container: Any, notes: list[str]) -> Any:
    videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not videos:
        kinds = ", ".join(sorted({s.type for s in container.streams}))
        raise DataError(f"{path} holds no video stream ({f'{kinds} only' if kinds else 'and no other'})")
    if container.format.name in ("image2", "png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe", "gif"):
        raise DataError(f"{path} is a picture ({container.format.name}), not a video")
    chosen = next((s for s in videos if s.disposition & Disposition.default), videos[0])
    left_out = [s for s in container.streams if s is not chosen and s.type not in _COPIED]
    if left_out:
        said = ", ".join(f"{s.type} {s.index}" for s in left_out)
        notes.append(f"left out: streams that are neither the video nor sound or subtitles ({said})")
    return chosen


def _source(path: Path, container: Any, stream: Any, notes: list[str]) -> Source:
    context = stream.codec_context
    if context is None:
        raise DataError("its video is in a codec that is not known")
    width, height, pix_fmt = context.width, context.height, context.pix_fmt
    if not (width and height and pix_fmt):
        raise DataError("its video stream says no size or pixel format; the file is damaged or holds no frame")
    _check_format(pix_fmt)
    colour = colour_of(
        pix_fmt, context.colorspace, context.color_range, context.color_primaries, context.color_trc, width, height
    )
    if context.field_order not in _PROGRESSIVE:
        raise DataError(INTERLACED)
    if context.colorspace == UNSPECIFIED and not colour.rgb:
        notes.append(f"its colour matrix is not said; taken as BT.{709 if colour.matrix == 1 else 601}, as players do")
    _check_whole(container, stream, path)
    aspect, rate = stream.sample_aspect_ratio or Fraction(1), stream.guessed_rate or Fraction(0)
    return Source(
        path=str(path),
        bytes=0,
        modified_ns=0,
        format=container.format.name,
        stream=stream.index,
        codec=context.name,
        width=width,
        height=height,
        pix_fmt=pix_fmt,
        colour=colour,
        time_base=stream.time_base.as_integer_ratio(),
        rate=rate.as_integer_ratio(),
        aspect=aspect.as_integer_ratio() if aspect > 0 else (1, 1),
        display=_display_matrix(container, stream),
        expected_frames=stream.frames or 0,
        said_seconds=_seconds(stream.metadata.get("DURATION", "")),
        tracks=tuple(
            Track(index=s.index, kind=s.type, codec=_codec_name(s), language=s.language or "")
            for s in container.streams
            if s.type in _COPIED
        ),
        notes=tuple(notes),
    )


INTERLACED = (
    "it is interlaced, and upscaling would keep the combs: deinterlace it first, for example with FFmpeg's bwdif"
)


def _check_format(pix_fmt: str) -> None:
    """Raises DataError for samples that the models cannot take, or that a result would lose."""
    if pix_fmt in SUBSAMPLING:
        return
    layout = av.VideoFormat(pix_fmt)
    if layout.has_palette:
        raise DataError("its colours are a palette; convert it to yuv444p first")
    names = {component.bits for component in layout.components}
    if any(bits > 8 for bits in names):
        raise DataError(
            f"it has {max(names)} bits a sample ({pix_fmt}), and the models work with 8: convert it first, for example with "
            "FFmpeg's `-pix_fmt yuv420p` if that is good enough"
        )
    if any(component.is_alpha for component in layout.components):
        raise DataError(f"it is partly transparent ({pix_fmt}), which would be lost: lay it over a background first")
    raise DataError(f"its pixel format {pix_fmt} is not one that is read: {', '.join(sorted(SUBSAMPLING))}")


def _check_whole(container: Any, stream: Any, path: Path) -> None:
    """Raises DataError if the file's index points behind its end: it was cut off."""
    entries, size = stream.index_entries, path.stat().st_size
    if len(entries) and "mp4" in container.format.name:
        last = max((entry.pos + entry.size for entry in entries), default=0)
        if last > size:
            raise DataError(f"it is cut off: its index goes on to byte {last:,}, and it has {size:,}. Copy it again")


def _display_matrix(container: Any, stream: Any) -> tuple[int, ...]:
    """From the first frame, which carries the stream's; the container is then behind its first frames."""
    with suppress(av.FFmpegError, OSError, ValueError):  # whoever reads all of it says where it is broken
        for number, frame in enumerate(container.decode(stream)):
            if frame.interlaced_frame:
                raise DataError(INTERLACED)
            if (found := frame.side_data.get("DISPLAYMATRIX")) is not None:
                matrix = struct.unpack("=9i", bytes(found))
                if matrix[0] and matrix[1]:
                    raise DataError("players turn it by an angle that is no right one; turn it first")
                identity = matrix[0] > 0 and not matrix[1] and matrix[4] > 0
                return () if identity else matrix
            if number >= _LOOKED_AT:
                break
    return ()


def _seconds(text: str) -> float:
    """Of hours:minutes:seconds, as Matroska's tags say it; 0 for what is no time."""
    try:
        hours, minutes, seconds = text.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return 0.0


def _codec_name(stream: Any) -> str:
    return stream.codec_context.name if stream.codec_context is not None else "unknown"


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
