"""The part of the command line about video: upscale."""

import importlib
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mlpipes.cli.common import console, friendly
from mlpipes.errors import ConfigError
from mlpipes.store.layout import default_store

if TYPE_CHECKING:
    from mlpipes.video.following import Progress as Reached

app = typer.Typer()
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")


@app.command()
@friendly
def upscale(
    source: Annotated[Path, typer.Argument(help="the video", readable=False)],
    result: Annotated[Path, typer.Argument(help="the file to write: .mp4, .m4v, .mov or .mkv")],
    scale: Annotated[int | None, typer.Option(help="2, 3 or 4; default: the model's, and 2 for bicubic")] = None,
    model: Annotated[
        str, typer.Option(help="bicubic, models:/NAME@champion, models:/NAME/VERSION or package.module:attribute")
    ] = "bicubic",
    workers: Annotated[int, typer.Option(min=1, max=1024, help="processes that upscale and encode")] = 2,
    gpus_per_worker: Annotated[float, typer.Option(min=0, max=8, help="0.5: two workers share a GPU; 0: CPUs")] = 0.0,
    chunk: Annotated[int | None, typer.Option(help="frames of a chunk; changes speed, not the result")] = None,
    precision: Annotated[str, typer.Option(help="of a network: fp32, or bf16 where the CPU or GPU has it")] = "fp32",
    crf: Annotated[int, typer.Option(min=0, max=51, help="quality of the encoding: less is better and larger")] = 16,
    preset: Annotated[str, typer.Option(help="of x264: veryfast, medium, slow …")] = "veryfast",
    preview: Annotated[bool, typer.Option("--preview", help="also a clip and a picture, side by side")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the result if it is there")] = False,
) -> None:
    """Upscale a video in parallel, with its sound and subtitles; a second call goes on where one stopped."""
    from mlpipes.compute.local import LocalRay
    from mlpipes.compute.places import is_local
    from mlpipes.video.following import deliver, delivered, follow, prepare, stop, tidy
    from mlpipes.video.job import Encoding, describe
    from mlpipes.video.joining import is_done
    from mlpipes.video.places import VideoRayJobs, check_place, place_for
    from mlpipes.video.preview import preview_of

    result = result.expanduser().absolute()
    if not result.parent.is_dir():
        raise ConfigError(f"the folder {result.parent} is not there; make it first")
    if result.is_dir() or (result.exists() and source.exists() and result.samefile(source)):
        raise ConfigError(f"{result} is {'a folder' if result.is_dir() else 'the source itself'}; name another file")
    if preset not in PRESETS:
        raise ConfigError(f"a preset of {preset!r} is none of x264's: {', '.join(PRESETS)}")
    check_place()
    encoding = Encoding(crf=crf, preset=preset)
    job = prepare(
        source,
        result,
        default_store(),
        model=model,
        scale=scale,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        chunk=chunk,
        precision=precision,
        encoding=encoding,
    )
    job = job.model_copy(update={"preview": preview})
    if delivered(job, result):
        tidy(job)  # where a crash came between
        console.print(f"{result} is this video, upscaled so, already.", soft_wrap=True, highlight=False)
        return
    if result.exists() and not overwrite:
        raise ConfigError(f"{result} is there already; name another file, or give --overwrite")
    # Before it has begun: an interruption in the middle of this import would leave nothing that can end the job.
    importlib.import_module("ray.job_submission")
    for name, value in describe(job).items():
        console.print(f"{name}: {value}", markup=False, highlight=False, soft_wrap=True)
    ray, local, began = LocalRay(), is_local(), time.monotonic()
    try:
        if not is_done(job):
            if local:
                with console.status("Starting a private Ray on loopback …"):
                    ray.ensure(passing=True)
            with Bars() as bars:
                follow(job, lambda: place_for(job), bars.show, bars.warn)
    except KeyboardInterrupt:
        if not local or ray.status() is not None:
            stop(job, place_for(job))
        console.print("Stopped. The same command goes on where it was.")
        raise typer.Exit(130) from None
    finally:
        if local:
            ray.release(VideoRayJobs.submitted)
    if (made := preview_of(job)) is not None and preview:
        for name in made.files:
            target = result.with_name(f"{result.stem}.{name}")
            shutil.copyfile(made.path / name, target)
            console.print(f"Preview: {target}", soft_wrap=True, highlight=False)
    deliver(job, result)
    size = result.stat().st_size / 1e6
    console.print(
        f"{result}: {job.width}×{job.height}, {size:.1f} MB, in {time.monotonic() - began:.0f} s.",
        soft_wrap=True,
        highlight=False,
    )


class Bars:
    """Progress of a video: frames read, upscaled and encoded, how many a second, and how long it will take."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
        )
        self.bars = Progress(*columns, TimeElapsedColumn(), console=console)
        self.tasks = {name: self.bars.add_task(name, total=None, speed="") for name in ("cut", "upscale", "encode")}
        self._first: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> "Bars":
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def warn(self, text: str) -> None:
        """Say something that a person should know, above the bars."""
        self.bars.console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def show(self, progress: "Reached") -> None:
        """Show how far it is."""
        now = time.monotonic()
        for name, done in (("cut", progress.cut), ("upscale", progress.upscaled), ("encode", progress.encoded)):
            # From when its first part was there: the start of processes is not its speed.
            began, before = self._first.setdefault(name, (now, done))
            if done <= before:
                self._first[name] = began, before = now, done
            speed = (done - before) / (now - began) if now > began else 0.0
            left = progress.total - done
            said = f"{speed:.1f} frames/s" if speed else ""
            if speed and left > 0:
                said += f", {left / speed:.0f} s left"
            if self.bars.tasks[self.tasks[name]].finished:
                continue
            self.bars.update(self.tasks[name], completed=done, total=progress.total or None, speed=said)
