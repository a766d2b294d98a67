"""What a file is: each bad input is one clear error that says what to do, before anything is started."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from mlpipes.errors import ConfigError, DataError
from mlpipes.video.job import chunk_length, suffix_of
from mlpipes.video.probe import probe
from mlpipes.video.reading import frames_of
from mlpipes_tests.video.made import HEIGHT, WIDTH, job_of, picture, write_video


def refused(path: Path, match: str) -> None:
    """The whole way from the file to its last frame ends in this error, which names the file."""
    with pytest.raises(DataError, match=match) as caught:
        for _ in frames_of(probe(path)):
            pass
    assert str(path) in str(caught.value)


def test_a_good_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "good.mp4", 12, audio=[{}], rate=Fraction(30000, 1001))
    source = probe(path)
    assert (source.width, source.height, source.codec, source.pix_fmt) == (WIDTH, HEIGHT, "h264", "yuv420p")
    assert source.rate == (30000, 1001)
    assert source.expected_frames == 12
    assert [(track.kind, track.codec) for track in source.tracks] == [("audio", "aac")]
    assert not source.display
    assert not source.rotation


def test_what_is_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.mp4", "cannot be read: No such file")
    refused(tmp_path, "is a folder; name a video file")
    refused(tmp_path / "frame-%04d.png", "names a sequence of images; make a video of them first")
    (tmp_path / "empty.mp4").touch()
    refused(tmp_path / "empty.mp4", "is empty")


@pytest.mark.parametrize("content", [b"no video at all " * 100, b"\0" * 5000, b"ftypmp42" * 9])
def test_a_broken_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    refused(path, "is no video that can be read")


def test_a_file_without_its_end(tmp_path: Path) -> None:
    """The index lies at the end of an MP4 file unless it was moved to its beginning."""
    path = write_video(tmp_path / "whole.mp4", 30)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(path.read_bytes()[:-2000])
    refused(cut, "is no video that can be read")
    data = remuxed(path, tmp_path / "moved.mp4", movflags="faststart").read_bytes()
    cut.write_bytes(data[: len(data) * 2 // 3])
    refused(cut, "is cut off: its index goes on to byte")


def remuxed(path: Path, target: Path, **options: str) -> Path:
    """The same packets in another file."""
    with av.open(str(path)) as source, av.open(str(target), "w", container_options=options) as out:
        streams = {s.index: out.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.size:
                packet.stream = streams[packet.stream_index]
                out.mux(packet)
    return target


def test_damage_of_the_container(tmp_path: Path) -> None:
    """Nothing is found behind it any more, and the demuxer takes that for the end."""
    path = write_video(tmp_path / "whole.mkv", 60)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = b"\xff" * 400
    path.write_bytes(data)
    refused(path, "is damaged or cut off: its last frame ends at")


def test_damage_of_a_frame(tmp_path: Path) -> None:
    """Players show it all the same."""
    path = write_video(tmp_path / "whole.mp4", 60, options={"crf": "20", "g": "60"})
    with av.open(str(path)) as container:
        start = container.streams.video[0].index_entries[20].pos + 12
    data = bytearray(path.read_bytes())
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    refused(path, "frame 20 is damaged")


def test_sound_only(tmp_path: Path) -> None:
    path = tmp_path / "sound.m4a"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 48000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    refused(path, r"holds no video stream \(audio only\)")


def test_a_cover_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "cover.png"
    av.VideoFrame.from_ndarray(picture(1), format="rgb24").save(str(path))
    refused(path, "is a picture")


def test_no_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "none.mp4", 0)
    refused(path, r"holds no video stream \(and no other\)")


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "match"),
    [
        ("libx264", "yuv420p10le", "has 10 bits a sample"),
        ("ffv1", "yuva420p", "partly transparent"),
        ("ffv1", "bgra", "partly transparent"),
        ("ffv1", "yuv410p", "is not one that is read"),
    ],
)
def test_samples_that_would_lose(tmp_path: Path, codec: str, pix_fmt: str, match: str) -> None:
    refused(write_video(tmp_path / "x.mkv", 3, codec=codec, pix_fmt=pix_fmt), match)


@pytest.mark.parametrize(("transfer", "match"), [(16, "it is HDR .PQ"), (18, "it is HDR .HLG")])
def test_hdr(tmp_path: Path, transfer: int, match: str) -> None:
    def tune(_: Any, stream: Any) -> None:
        stream.codec_context.color_trc, stream.codec_context.colorspace = transfer, 9

    refused(write_video(tmp_path / "x.mp4", 3, tune=tune), match)


def test_interlaced(tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.mp4", 6, options={"x264-params": "interlaced=1:tff=1"})
    refused(path, "it is interlaced")


def test_a_size_that_changes(tmp_path: Path) -> None:
    """As a raw stream may: two videos one behind the other."""
    path = tmp_path / "x.h264"
    parts = [write_video(tmp_path / f"{n}.h264", 4, size=size) for n, size in enumerate([(64, 48), (96, 48)])]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    refused(path, r"frame \d is .* and the file began as .*: a video that changes its size cannot be upscaled")


def test_a_growing_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.mkv", 12)
    source = probe(path)
    source.check_unchanged()
    with path.open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(DataError, match="has changed since it was looked at"):
        source.check_unchanged()


def test_sound_that_the_container_cannot_hold(tmp_path: Path) -> None:
    from mlpipes.video.joining import check_container

    path = write_video(tmp_path / "x.mkv", 6, audio=[{"codec": "wavpack", "language": "eng"}])
    with pytest.raises(ConfigError, match=r"a .mp4 file cannot hold audio stream 1 \(wavpack\).*Name the result .mkv"):
        check_container(job_of(path, tmp_path / "store", ".mp4"))
    check_container(job_of(path, tmp_path / "store", ".mkv"))


def test_settings() -> None:
    with pytest.raises(ConfigError, match=r"result.avi: the result is written as .m4v, .mkv, .mov, .mp4"):
        suffix_of(Path("result.avi"))
    with pytest.raises(ConfigError, match="holds none"):
        chunk_length(0)
    assert [chunk_length(asked) for asked in (None, 1, 4, 5, 48)] == [48, 4, 4, 8, 48]


def test_no_torch_to_look_at_a_file() -> None:
    code = "import sys, mlpipes.video.following; print([m for m in ('torch', 'ray', 'mlflow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
