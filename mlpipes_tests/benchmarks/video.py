"""Benchmark: videos: frames per CPU-second against a plain loop, memory by length, and the real clip against itself.

Run as `python -m mlpipes_tests.benchmarks.video speed|memory|clip [--model models:/mlpipes-video_sr@champion]`, `clip` also
with `--precision bf16`, and with MLPIPES_REAL_DATA set. All of it is in processes of its own without Ray, whose start is not
what is measured.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import nn

from mlpipes.store.files import digest_of, publishing
from mlpipes.store.layout import Store, default_store
from mlpipes.video import models
from mlpipes.video.chunks import cut
from mlpipes.video.encoding import configure, encode_segment
from mlpipes.video.job import Encoding, ModelPin, VideoJob
from mlpipes.video.joining import join
from mlpipes.video.upscaling import upscale_chunk
from mlpipes.workloads.fidelity import warping_error
from mlpipes_tests.video.made import WIDTH, job_of, picture, write_video

CLIP = "super_resolution/clips/car-detection.mp4"
MOTION_EVERY = 15
"""Of so many pairs of neighbouring frames, the motion in one is measured, which takes seconds."""
SPEED_FRAMES, SIZES = 16, ((480, 270), (960, 540))
LENGTHS = (100, 1000, 10_000)


class Compact(nn.Module):
    """A network of the size of those for video (SRVGG): eight layers of 32 channels, and a shuffle; untrained."""

    def __init__(self, scale: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU()]
        for _ in range(6):
            layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
        self.scale = scale
        self.body = nn.Sequential(*layers, nn.Conv2d(32, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Upscaled frames, uint8 as they came."""
        x = frames.permute(0, 3, 1, 2).float() / 255
        base = nn.functional.interpolate(x, scale_factor=self.scale, mode="nearest")
        return ((base + self.body(x)).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def network(store: Store) -> ModelPin:
    """The untrained network, exported and pinned in a store."""
    example, sizes = torch.zeros((2, 20, 24, 3), dtype=torch.uint8), dict.fromkeys(range(3), torch.export.Dim.AUTO)
    program, digest = torch.export.export(Compact(), (example,), dynamic_shapes={"frames": sizes}), digest_of("compact")
    with publishing(models._place(store, digest), kind=models._KIND, version=models._VERSION) as draft:
        torch.export.save(program, draft.path / models._FILE)
    return ModelPin(name="compact, untrained", kind="program", digest=digest, scale=2, reach=8)


def all_parts(job: VideoJob) -> tuple[Path, dict[str, float]]:
    """The result, and the CPU-seconds of each part."""
    took, began = {}, time.process_time()

    def lap(name: str) -> None:
        nonlocal began
        took[name], began = time.process_time() - began, time.process_time()

    plan = cut(job)
    lap("cut")
    model = models.load(job.model, Store(Path(job.store)))
    lap("load")
    for index in range(plan.chunks):
        upscale_chunk(job, plan, index, model)
    lap("upscale")
    for index in range(plan.segments):
        encode_segment(job, plan, index)
    lap("encode")
    path = join(job, plan)
    lap("join")
    return path, took


def plain_loop(job: VideoJob, target: Path) -> float:
    """The textbook way: decode, upscale one frame in fp32, encode; CPU-seconds without the loading of the model."""
    program: Any = torch.export.load(models._place(Store(Path(job.store)), job.model.digest) / models._FILE).module()
    began = time.process_time()
    with av.open(job.source.path) as source, av.open(str(target), "w") as out, torch.inference_mode():
        stream: Any = out.add_stream("libx264", rate=Fraction(*job.source.rate))
        configure(stream.codec_context, job)
        for number, frame in enumerate(source.decode(video=0)):
            image = program(torch.from_numpy(frame.to_ndarray(format="rgb24"))[None])[0].numpy()
            made = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(format=job.pix_fmt)
            made.pts = frame.pts if frame.pts is not None else number
            made.time_base = frame.time_base
            out.mux(stream.encode(made))
        out.mux(stream.encode(None))
    return time.process_time() - began


def speed(model: str | None) -> None:
    """Frames per CPU-second."""
    torch.set_num_threads(1)
    for size in SIZES:
        _speed_of(size, model)


def _speed_of(size: tuple[int, int], model: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        images = [picture(n, *size) for n in range(SPEED_FRAMES)]
        path = write_video(Path(folder) / "x.mp4", images, size=size, options={"crf": "18"})
        pinned = models.pin(model, None, store) if model else network(store)
        base = job_of(path, store.root).model_copy(update={"encoding": Encoding(), "chunk": 16})
        plain = plain_loop(base.model_copy(update={"model": pinned}), Path(folder) / "plain.mp4")
        print(f"{size[0]}×{size[1]} ×{pinned.scale}, {SPEED_FRAMES} frames, {pinned.name}; one thread, {_cpu()}")
        print("| way | frames a CPU-second | against the plain loop | network's part |\n| --- | --- | --- | --- |")
        print(f"| plain loop, fp32, batch 1 | {SPEED_FRAMES / plain:.2f} | 1.00 | |")
        for precision in ("fp32", "bf16"):
            job = base.model_copy(update={"model": pinned.model_copy(update={"precision": precision})})
            _, took = all_parts(job)
            total = sum(seconds for name, seconds in took.items() if name != "load")
            parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in took.items())
            print(f"| ours, {precision} | {SPEED_FRAMES / total:.2f} | {plain / total:.2f} | {parts} |")


def memory(_: str | None) -> None:
    """The greatest memory of a process that upscales videos of different lengths."""
    print("| frames | greatest resident memory, MiB |\n| --- | --- |")
    for length in LENGTHS:
        command = [sys.executable, "-m", "mlpipes_tests.benchmarks.video", "one", "--frames", str(length)]
        print(f"| {length:,} | {subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()} |")


def one(frames: int) -> None:
    """Print the greatest memory of this process while it upscales so many tiny frames."""
    with tempfile.TemporaryDirectory() as folder:
        images = (picture(n % 256, WIDTH, 48) for n in range(frames))
        path = Path(folder) / "x.mp4"
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = WIDTH, 48, "yuv420p"
            for image in images:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
        all_parts(job_of(path, Path(folder) / "store", chunk=48))
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}")


def clip(model: str | None, precision: str = "fp32") -> None:
    """The real clip, made half as large and upscaled, against itself."""
    import os

    original = Path(os.environ["MLPIPES_REAL_DATA"]) / CLIP
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.mkv"
        _halve(original, small)
        print("| model | PSNR Y, dB | SSIM Y | warping error, levels (original's own) |\n| --- | --- | --- | --- |")
        for spec in ["bicubic", *([model] if model else [])]:
            job = job_of(small, Path(folder) / "store", ".mp4", chunk=48)
            keeper = default_store() if spec != "bicubic" else Store(Path(folder))
            pinned = models.pin(spec, None, keeper, precision)
            place = str(default_store().root) if spec != "bicubic" else job.store
            job = job.model_copy(update={"model": pinned, "store": place, "encoding": Encoding(crf=10)})
            made, took = all_parts(job)
            print(f"| {pinned.name}, {pinned.precision} | {_compare(original, made)} |")
            print(
                f"  {', '.join(f'{name} {seconds:.1f} CPU-s' for name, seconds in took.items())}; {made}",
                file=sys.stderr,
            )


def _halve(original: Path, target: Path) -> None:
    """Half as large by an area filter (with antialiasing), lossless, with the same times and sound."""
    with av.open(str(original)) as source, av.open(str(target), "w") as out:
        template = source.streams.video[0]
        stream: Any = out.add_stream("ffv1", rate=template.average_rate, options={"level": "3"})
        stream.width, stream.height, stream.pix_fmt = template.width // 2, template.height // 2, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for name in ("colorspace", "color_range", "color_primaries", "color_trc"):
            setattr(stream.codec_context, name, getattr(template.codec_context, name))
        sound = out.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux():
            if packet.stream.type == "audio" and packet.size:
                packet.stream = sound
                out.mux(packet)
            elif packet.stream.type == "video":
                for frame in packet.decode():
                    whole: Any = frame
                    half = whole.reformat(stream.width, stream.height, interpolation="BICUBIC")
                    out.mux(stream.encode(half))
        out.mux(stream.encode(None))


def _luma(path: Path) -> Any:
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            plane = frame.planes[0]
            rows = np.frombuffer(bytes(plane), np.uint8).reshape(plane.height, plane.line_size)
            yield rows[:, : plane.width].astype(np.float64), (frame.pts or 0) * Fraction(frame.time_base or 1)


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of two planes, with Gaussian windows of σ 1.5."""
    from scipy.ndimage import gaussian_filter

    def blurred(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, truncate=3.5)[5:-5, 5:-5]

    mean_a, mean_b, c1, c2 = blurred(a), blurred(b), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    of_a, of_b, both = (blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2, blurred(a * b) - mean_a * mean_b)
    likeness = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (of_a + of_b + c2))
    return float(likeness.mean())


def motion(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Where each pixel of the second frame (H, W) was in the first: (2, H, W), right and down, by iterative Lucas-Kanade."""
    from skimage.registration import optical_flow_ilk

    down, right = optical_flow_ilk(second, first, radius=9)
    return np.stack([right, down])


def _temporal(truth: tuple[np.ndarray, np.ndarray], made: tuple[np.ndarray, np.ndarray]) -> list[float]:
    """Of two frames that were made and of the true ones: their warping errors along the truth's motion.

    No tOF: where this clip is flat, Lucas-Kanade's motion is noise, and so is its difference between two versions.
    """
    flow = torch.from_numpy(motion(*truth))
    return [warping_error(torch.from_numpy(a), torch.from_numpy(b), flow, 16) for a, b in (made, truth)]


def _compare(original: Path, made: Path) -> str:
    noises, likeness, changes, before, late = [], [], [], None, Fraction(0)
    for (a, at), (b, then) in zip(_luma(original), _luma(made), strict=True):
        noises.append(((a - b)[2:-2, 2:-2] ** 2).mean())
        if len(noises) % 10 == 1:
            likeness.append(ssim(a, b))
        if before is not None and len(noises) % MOTION_EVERY == 0:
            changes.append(_temporal((before[0], a), (before[1], b)))
        before, late = (a, b), max(late, abs(at - then))
    ours, own = np.mean(changes, axis=0)
    decibels = np.mean([10 * np.log10(255**2 / noise) for noise in noises])
    times = f"{len(noises)} frames, {len(changes)} pairs for motion, times within {float(late) * 1000:.2f} ms"
    return f"{decibels:.2f} | {np.mean(likeness):.4f} | {ours:.3f} ({own:.3f}); {times}"


def _cpu() -> str:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    return "a CPU with bf16" if "avx512_bf16" in flags else "a CPU without bf16"


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["speed", "memory", "clip", "one"])
    parser.add_argument("--model")
    parser.add_argument("--precision", default="fp32", help="of `clip`")
    parser.add_argument("--frames", type=int, default=100)
    chosen = parser.parse_args()
    if chosen.what == "one":
        one(chosen.frames)
    elif chosen.what == "clip":
        clip(chosen.model, chosen.precision)
    else:
        {"speed": speed, "memory": memory}[chosen.what](chosen.model)


if __name__ == "__main__":
    main()
