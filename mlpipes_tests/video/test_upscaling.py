"""From a video to its upscaled one, in one process: every frame once, at its time, with everything else of the file."""

import errno
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from mlpipes.errors import CorruptionError, DiskFullError, PreflightError
from mlpipes.store.files import sha256_file
from mlpipes.store.layout import Store
from mlpipes.video import chunks, disk
from mlpipes.video.chunks import SOURCE, UPSCALED, cut, disk_errors, frames_in, need_chunk
from mlpipes.video.encoding import encode_segment
from mlpipes.video.job import SEGMENT, Plan
from mlpipes.video.joining import join
from mlpipes.video.models import load
from mlpipes.video.probe import probe
from mlpipes.video.upscaling import upscale_chunk
from mlpipes_tests.video.made import (
    HEIGHT,
    WIDTH,
    images_of,
    job_of,
    number_in,
    packets_of,
    picture,
    times_of,
    upscale_here,
    write_video,
)


def same_frames(path: Path, made: Path, numbers: list[int], *, scale: int = 2) -> None:
    """The result has the frames of these numbers, larger, and at the source's times."""
    images = images_of(made)
    assert [number_in(image) for image in images] == numbers
    assert all(image.shape == (HEIGHT * scale, WIDTH * scale, 3) for image in images)
    assert times_of(made) == times_of(path)


@pytest.mark.parametrize(("frames", "scale", "suffix"), [(1, 2, ".mp4"), (13, 3, ".mkv"), (21, 4, ".mov")])
def test_every_frame_once(tmp_path: Path, frames: int, scale: int, suffix: str) -> None:
    path = write_video(tmp_path / "x.mp4", frames)
    made = upscale_here(path, tmp_path / "store", suffix, scale=scale)
    same_frames(path, made, list(range(frames)), scale=scale)
    with av.open(str(path)) as before, av.open(str(made)) as after:
        assert abs((before.duration or 0) - (after.duration or 0)) <= 1000
    for image, number in zip(images_of(made), range(frames), strict=True):
        small = image[scale // 2 :: scale, scale // 2 :: scale].astype(int)
        assert np.abs(small - picture(number)).mean() < 8  # the same picture, not only its number


def test_neither_chunks_nor_what_was_done_before_change_a_byte(tmp_path: Path) -> None:
    """More frames than a segment has, so that segments cross the borders of chunks."""
    path = write_video(tmp_path / "x.mp4", SEGMENT + 15, audio=[{}])
    digests = set()
    for chunk in (8, 60, 300):
        digests.add(sha256_file(upscale_here(path, tmp_path / f"store{chunk}", chunk=chunk)))
    job = job_of(path, tmp_path / "again", chunk=40)
    plan, model = cut(job), load(job.model, Store(tmp_path / "again"))
    for index in reversed(range(plan.chunks)):
        upscale_chunk(job, plan, index, model)
    shutil.rmtree(job.folder.source_chunk(3))  # lost, and cut again by itself
    assert cut(job) == plan
    for index in reversed(range(plan.segments)):
        encode_segment(job, plan, index)
    assert encode_segment(job, plan, 0) == upscale_chunk(job, plan, 0, model) == 0  # there already
    digests.add(sha256_file(join(job, plan)))
    assert len(digests) == 1


def test_variable_frame_rate(tmp_path: Path) -> None:
    """Also across the border of segments, where decoding must not go back in time."""
    frames, ticks = SEGMENT + 20, [0]
    for n in range(frames):
        ticks.append(ticks[-1] + (1000, 40, 40, 3000, 1)[n % 5])
    path = write_video(tmp_path / "x.mp4", frames, time_base=Fraction(1, 12800), pts=lambda n: ticks[n])
    assert len(set(np.diff([float(t) for t in times_of(path)]).round(6))) == 4
    made = upscale_here(path, tmp_path / "store", chunk=100)
    same_frames(path, made, [n % 256 for n in range(frames)])


def test_odd_sizes_keep_their_size(tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.mkv", 3, codec="ffv1", pix_fmt="yuv444p", size=(63, 47))
    made = upscale_here(path, tmp_path / "store", scale=3)
    source = probe(made)
    assert (source.width, source.height, source.pix_fmt) == (189, 141, "yuv444p")
    assert [number_in(image) for image in images_of(made)] == [0, 1, 2]


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_kept(tmp_path: Path, degrees: int) -> None:
    def tune(_: Any, stream: Any) -> None:
        stream.set_display_rotation(degrees)

    path = write_video(tmp_path / "x.mp4", 3, tune=tune)
    rotation = probe(path).rotation
    assert rotation % 360 in (degrees, 360 - degrees)
    made = upscale_here(path, tmp_path / "store")
    assert probe(made).rotation == rotation
    assert probe(made).width == 2 * WIDTH
    with av.open(str(path)) as before, av.open(str(made)) as after:
        assert next(before.decode(video=0)).rotation == next(after.decode(video=0)).rotation != 0


def test_sample_aspect_and_colour_are_kept(tmp_path: Path) -> None:
    def tune(_: Any, stream: Any) -> None:
        context = stream.codec_context
        context.sample_aspect_ratio = Fraction(16, 15)
        context.colorspace, context.color_primaries, context.color_trc, context.color_range = 5, 5, 6, 2

    path = write_video(tmp_path / "x.mp4", 3, tune=tune)
    before, after = probe(path), probe(upscale_here(path, tmp_path / "store"))
    assert before.aspect == after.aspect == (16, 15)
    assert before.colour == after.colour
    assert (after.colour.matrix, after.colour.full, after.colour.primaries) == (5, True, 5)


def test_open_groups_of_pictures_and_a_single_key_frame(tmp_path: Path) -> None:
    options = {"g": "10", "bf": "3", "x264-params": "open-gop=1:keyint=10:min-keyint=10:scenecut=0"}
    path = write_video(tmp_path / "open.mkv", 45, options={**options, "preset": "medium"})
    same_frames(path, upscale_here(path, tmp_path / "store"), list(range(45)))
    path = write_video(
        tmp_path / "single.mkv", 60, options={"g": "100000", "x264-params": "keyint=infinite:scenecut=0"}
    )
    same_frames(path, upscale_here(path, tmp_path / "store"), list(range(60)))


def test_a_stream_without_times(tmp_path: Path) -> None:
    """Raw H.264: frames follow one another at the rate that the stream says, or is taken to have."""
    path = write_video(tmp_path / "x.h264", 20)
    made = upscale_here(path, tmp_path / "store")
    assert [number_in(image) for image in images_of(made)] == list(range(20))
    gaps = set(np.diff([float(t) for t in times_of(made)]).round(6))
    assert gaps == {0.04}


def test_times_that_do_not_rise(tmp_path: Path) -> None:
    """Two frames at the same time, and one before the one before: kept, a tick behind the one before, and counted."""
    path = tmp_path / "x.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, options={"g": "1", "bf": "0", "qscale": "2"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate = 4_000_000
        for number, pts in enumerate([0, 40, 80, 80, 120, 100, 160]):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            for packet in stream.encode(frame):
                packet.pts, packet.dts, packet.time_base = pts, number - 50, Fraction(1, 1000)
                container.mux(packet)
    job = job_of(path, tmp_path / "store")
    plan = cut(job)
    assert plan.frames == 7
    assert plan.mended == 2
    made = upscale_here(path, tmp_path / "store")
    assert [number_in(image) for image in images_of(made)] == list(range(7))
    times = times_of(made)
    assert times == sorted(set(times))


def test_all_sound_subtitles_chapters_and_titles(tmp_path: Path) -> None:
    def tune(container: Any, stream: Any) -> None:
        container.metadata["title"] = "A film"
        container.set_chapters(
            [{"id": 1, "start": 0, "end": 300, "time_base": Fraction(1, 1000), "metadata": {"title": "Part one"}}]
        )

    for suffix in (".mkv", ".mp4"):
        path = write_video(
            tmp_path / f"x{suffix}",
            24,
            audio=[{"language": "eng"}, {"language": "ger", "hertz": 880, "start": 0.25}],
            subtitles=["fre", "spa"],
            tune=tune,
        )
        made = upscale_here(path, tmp_path / f"store{suffix}", suffix)
        for kind in ("audio", "subtitle"):
            before, after = packets_of(path, kind), packets_of(made, kind)
            assert [[data for _, data in stream] for stream in after] == [[data for _, data in s] for s in before]
            for one, other in zip(before, after, strict=True):
                assert all(abs(a - b) < Fraction(2, 1000) for (a, _), (b, _) in zip(one, other, strict=True))
            assert len(after) == 2
        assert packets_of(made, "audio")[1][0][0] > Fraction(2, 10)  # what starts later still does
        with av.open(str(path)) as before, av.open(str(made)) as after:
            assert [s.language for s in after.streams] == [s.language for s in before.streams]
            assert after.metadata["title"] == "A film"
            assert [c["metadata"]["title"] for c in after.chapters()] == ["Part one"]
            assert [s.type for s in after.streams] == [s.type for s in before.streams]
        same_frames(path, made, list(range(24)))


def test_a_broadcast_starts_at_zero(tmp_path: Path) -> None:
    """The clock of an MPEG transport stream starts anywhere; sound and picture stay together."""
    path = write_video(
        tmp_path / "x.ts", 24, audio=[{"codec": "mp2", "start": 2.1}], pts=lambda n: n + 50, options={"bf": "0"}
    )
    begin = times_of(path)[0]
    assert begin > 1
    made = upscale_here(path, tmp_path / "store")
    sound = packets_of(path, "audio")[0][0][0]
    assert times_of(made)[0] - packets_of(made, "audio")[0][0][0] == pytest.approx(float(begin - sound), abs=0.001)
    assert min(times_of(made)[0], packets_of(made, "audio")[0][0][0]) < Fraction(1, 10)


def test_an_edit_list(tmp_path: Path) -> None:
    """A file that begins in the middle of a group of pictures, as cameras and cutting programs leave it."""
    whole = write_video(tmp_path / "whole.mp4", 40, options={"g": "40"})
    path = tmp_path / "x.mp4"
    with av.open(str(whole)) as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        shift = 10 * 512  # ten frames of 1/12800: what is before zero is decoded, and not shown
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts, packet.dts, packet.stream = (packet.pts or 0) - shift, (packet.dts or 0) - shift, stream
                out.mux(packet)
    shown = [number_in(image) for image in images_of(path)]
    assert 29 <= len(shown) < 40
    same_frames(path, upscale_here(path, tmp_path / "store"), shown)


def test_a_corrupt_chunk_is_noticed_and_made_again(tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.mp4", 12)
    good = sha256_file(upscale_here(path, tmp_path / "good"))
    job = job_of(path, tmp_path / "store")
    plan, model = cut(job), load(job.model, Store(tmp_path / "store"))
    for index in range(plan.chunks):
        upscale_chunk(job, plan, index, model)
    for target in (job.folder.upscaled_chunk(1), job.folder.source_chunk(0)):
        file = next(target.glob("*.mkv"))
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with pytest.raises(CorruptionError, match="is quarantined"):
        encode_segment(job, plan, 0)
    assert not job.folder.upscaled_chunk(1).exists()
    with pytest.raises(CorruptionError, match="is quarantined"):
        upscale_chunk(job, plan, 0, model)
        need_chunk(job.folder.source_chunk(0), SOURCE)
    cut(job)
    assert upscale_chunk(job, plan, 1, model) == 4
    encode_segment(job, plan, 0)
    assert sha256_file(join(job, plan)) == good


def test_chunks_are_lossless_and_hold_whole_batches(tmp_path: Path) -> None:
    for pix_fmt in ("yuv420p", "yuvj420p", "yuv422p", "yuv444p"):
        codec = "mjpeg" if "j" in pix_fmt else "ffv1"
        path = write_video(tmp_path / f"{pix_fmt}.mkv", 6, codec=codec, pix_fmt=pix_fmt, options={"strict": "-1"})
        job = job_of(path, tmp_path / "store", chunk=5)
        plan = cut(job)
        assert plan == Plan(frames=6, chunk=8, mended=0)
        with av.open(str(path)) as container:
            wanted = [[bytes(plane) for plane in frame.planes] for frame in container.decode(video=0)]
        found = frames_in(need_chunk(job.folder.source_chunk(0), SOURCE))
        assert [[bytes(plane) for plane in frame.planes] for frame in found] == wanted


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "x.mp4", 12)
    job = job_of(path, tmp_path / "store")
    assert disk.check_disk(job) > 0
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(PreflightError, match=r"x.mp4 needs about .* GiB while it is made.*Nothing was started"):
        disk.check_disk(job)
    with (
        pytest.raises(DiskFullError, match=r"is full. Make room, and give the same command again"),
        disk_errors(tmp_path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(chunks, "_write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(DiskFullError):
        cut(job)
    assert not job.folder.plan.exists()
    assert not list(job.folder.source_chunk(0).parent.iterdir())  # nothing half-written


def test_nothing_is_upscaled_twice(tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.mp4", 12)
    job = job_of(path, tmp_path / "store")
    plan = cut(job)
    calls: list[int] = []

    def counted(frames: np.ndarray) -> np.ndarray:
        calls.append(len(frames))
        return load(job.model, Store(tmp_path / "store"))(frames)

    counted.scale = 2  # pyright: ignore[reportFunctionMemberAccess]
    for _ in range(2):
        for index in range(plan.chunks):
            upscale_chunk(job, plan, index, counted)  # pyright: ignore[reportArgumentType]
    assert calls == [4, 4, 4]
    assert need_chunk(job.folder.upscaled_chunk(1), UPSCALED).meta["frames"] == 4
