"""One video to be upscaled: what its result depends on, by which it is named, and where its parts lie in the store."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from mlpipes.errors import ConfigError
from mlpipes.store.files import digest_of
from mlpipes.store.layout import JobFolder, Store
from mlpipes.store.record import Record
from mlpipes.video.colour import result_format
from mlpipes.video.probe import Source

FORMAT = 1
"""Of chunks and segments, and of how they are made; another number is another result."""
BATCH = 4
"""Frames that a model takes at once. A chunk holds whole batches, so that a frame has the same neighbours in its batch
whatever the length of chunks: kernels may round differently in another batch."""
SEGMENT = 250
"""Frames that an encoder gets before the next one begins: what is lost with it, and how far players seek."""
CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
"""What a result can be written as, by its file's suffix, and FFmpeg's name of it."""
SCALES = (2, 3, 4)


class ModelPin(BaseModel):
    """A model as it was when the video was begun; its bytes are what counts."""

    model_config = ConfigDict(frozen=True)

    name: str
    """For people, such as `models:/mlpipes-video_sr/3`."""
    kind: str
    """`built-in`, `program` (in the store, under its digest) or `python` (`module:attribute`)."""
    digest: str
    scale: int
    frames: int = 1
    """Neighbouring frames that it looks at, itself included; odd."""
    reach: int = 0
    """Pixels on each side that a pixel of its result depends on."""
    precision: str = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    """What computes it: a GPU adds in another order, so its result is another one."""


class Encoding(BaseModel):
    """How the result is compressed: H.264 of constant quality."""

    model_config = ConfigDict(frozen=True)

    crf: int = 16
    preset: str = "veryfast"


class VideoJob(Record):
    """A video to be upscaled by one model."""

    source: Source
    source_digest: str
    """SHA-256 of the file."""
    model: ModelPin
    encoding: Encoding = Encoding()
    suffix: str
    store: str
    chunk: int
    """Frames of a chunk, whole batches. Changes speed, not the result; like all that follows."""
    workers: int
    gpus_per_worker: float = 0.0
    """Below 1, workers share a GPU."""
    attempt: int = 0
    requested_by: str = ""
    """The Dagster run that wants it; empty if none does."""
    until: Literal["upscaled", "final"] = "final"
    """What is to be there when the job ends."""
    preview: bool = False
    """Whether a clip of both is made, side by side, besides the picture."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what the result depends on: the name of the video's folder and of its Ray job."""
        # Names given before there was a choice of devices stay.
        model = self.model.model_dump(
            mode="json", exclude={"name"} | ({"device"} if self.model.device == "cpu" else set())
        )
        return digest_of(
            {
                "format": [FORMAT, BATCH, SEGMENT],
                "source": self.source_digest,
                # Not where the file lies or what it is called.
                "read": self.source.model_dump(mode="json", exclude={"path", "modified_ns", "notes"}),
                "model": model,
                "encoding": self.encoding.model_dump(mode="json"),
                "suffix": self.suffix,
            }
        )

    @property
    def folder(self) -> "VideoFolder":
        """Where its parts lie."""
        return VideoFolder(Store(Path(self.store)).root / "videos" / self.fingerprint, self.chunk)

    @property
    def width(self) -> int:
        """Of the result."""
        return self.source.width * self.model.scale

    @property
    def height(self) -> int:
        """Of the result."""
        return self.source.height * self.model.scale

    @property
    def pix_fmt(self) -> str:
        """Of the result."""
        return result_format(self.source.pix_fmt, self.width, self.height)


@dataclass(frozen=True)
class VideoFolder(JobFolder):
    """Everything about one video, named by its fingerprint."""

    chunk: int

    @property
    def plan(self) -> Path:
        """How many frames and chunks there are; there only when the source is cut."""
        return self.path / f"plan-{self.chunk}.json"

    def source_chunk(self, index: int) -> Path:
        """Frames of the source, lossless."""
        return self.path / f"source-{self.chunk}" / f"{index:06d}"

    def upscaled_chunk(self, index: int) -> Path:
        """The same frames, upscaled, lossless."""
        return self.path / f"upscaled-{self.chunk}" / f"{index:06d}"

    def segment(self, index: int) -> Path:
        """Frames of the result, encoded; the same whatever the length of chunks."""
        return self.path / "segments" / f"{index:06d}"

    @property
    def final(self) -> Path:
        """The finished video, in a published directory."""
        return self.path / "final"

    @property
    def preview(self) -> Path:
        """A picture, and if asked for a clip, of source and result side by side, in a published directory."""
        return self.path / "preview"

    @property
    def job(self) -> Path:
        """What was asked for."""
        return self.path / "job.json"

    @property
    def parts(self) -> tuple[Path, ...]:
        """What nobody needs any more when the video is finished."""
        return (*self.path.glob("source-*"), *self.path.glob("upscaled-*"), self.path / "segments")


class Plan(Record):
    """How a source was cut."""

    frames: int
    chunk: int
    mended: int
    """Frames whose time was missing or not greater than the one before."""

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return -(-self.frames // self.chunk)

    @property
    def segments(self) -> int:
        """How many segments the result has."""
        return -(-self.frames // SEGMENT)

    def frames_of_segment(self, index: int) -> range:
        """The frames of a segment."""
        return range(index * SEGMENT, min((index + 1) * SEGMENT, self.frames))

    def chunks_of_segment(self, index: int) -> range:
        """The chunks that hold a segment's frames."""
        frames = self.frames_of_segment(index)
        return range(frames.start // self.chunk, (frames.stop - 1) // self.chunk + 1)


def suffix_of(path: Path) -> str:
    """The suffix by which a result's container is chosen. Raises ConfigError for one that is not known."""
    suffix = path.suffix.lower()
    if suffix not in CONTAINERS:
        raise ConfigError(
            f"{path.name}: the result is written as {', '.join(sorted(CONTAINERS))}, by its file's suffix; .mkv holds any "
            "sound and subtitles"
        )
    return suffix


def chunk_length(asked: int | None) -> int:
    """A chunk's length in whole batches. Raises ConfigError for less than one frame."""
    if asked is not None and asked < 1:
        raise ConfigError(f"a chunk of {asked} frames holds none; give 1 or more")
    return -(-(asked or 48) // BATCH) * BATCH


def describe(job: VideoJob) -> dict[str, Any]:
    """What a job is, for people."""
    source = job.source
    rate = source.rate[0] / source.rate[1]
    return {
        "source": source.path,
        "video": f"{source.width}×{source.height} {source.codec} {source.pix_fmt}, {rate:.3f} frames/s",
        "result": f"{job.width}×{job.height} h264 {job.pix_fmt}, crf {job.encoding.crf}",
        "model": f"{job.model.name} (×{job.model.scale}, {job.model.precision}{', GPU' * (job.gpus_per_worker > 0)})",
        "copied": ", ".join(f"{t.kind} {t.codec} {t.language}".strip() for t in source.tracks) or "–",
        "notes": "; ".join(source.notes) or "–",
    }
