"""`mlpipes upscale` with real processes: killed anywhere, stopped, with other workers and chunks: the same bytes."""

import random
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from mlpipes.cli.app import app
from mlpipes.compute.local import LocalRay
from mlpipes.errors import PreflightError
from mlpipes.store.files import sha256_file
from mlpipes.video.following import follow
from mlpipes.video.places import VideoRayJobs
from mlpipes_tests.video.command import Command, kill
from mlpipes_tests.video.made import QUICK, job_of, upscale_here, write_video
from mlpipes_tests.video.upscalers import wait_at
from mlpipes_tests.waiting import until

HERE = "mlpipes_tests.video.upscalers"


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path / "home")


@pytest.fixture(autouse=True)
def no_ray_is_left(tmp_path: Path) -> object:
    yield
    LocalRay(tmp_path / "home" / "ray").stop()


def someone_else(reached: Path, than: str, running: "subprocess.Popen[bytes]") -> str:
    """Wait until another process than this one is at the gate; returns which."""
    return until(
        lambda: (found := reached.read_text() if reached.is_file() else "") * (found != than),
        "a worker is at the gate",
        vain=lambda: "" if running.poll() is None else "the command has ended",
    )


@pytest.mark.chaos
def test_killed_stopped_and_gone_on_with(tmp_path: Path, command: Command) -> None:
    """A worker, the driver, Ray's agent and the command itself are killed, then it is interrupted; each time it goes on."""
    path, out, log = write_video(tmp_path / "x.mp4", 22, audio=[{}]), tmp_path / "out.mp4", tmp_path / "log"
    wanted = sha256_file(upscale_here(path, tmp_path / "store", encoding=QUICK))
    arguments = (path, out, "--model", f"{HERE}:gated", "--chunk", "4")
    reached = wait_at(command.home, 9)
    first = command.start(*arguments, "--workers", "2", log=log)
    at_gate = someone_else(reached, "", first)
    for victim in ("worker", "driver", "agent"):
        kill({"worker": lambda here=at_gate: int(here), "driver": command.driver, "agent": command.agent}[victim]())
        at_gate = someone_else(reached, at_gate, first)
        assert first.poll() is None
        assert not out.exists()
    first.kill()
    first.wait()
    second = command.start(*arguments, "--workers", "2", log=log)
    until(lambda: log.read_text().count("notes:") == 2 or second.poll() is not None, "the second call has begun")
    second.send_signal(signal.SIGINT)
    until(lambda: second.poll() is not None, "the interrupted command ends")
    assert second.returncode == 130, log.read_text()
    assert "The same command goes on where it was" in log.read_text()
    assert [p.name for p in tmp_path.glob("*out*")] == []
    until(lambda: not lives(int(at_gate)), "the worker at the gate ends with its job")
    (command.home / "gate" / "9").unlink()
    assert command.run(*arguments, "--workers", "4", "--preview", log=log) == 0, log.read_text()
    assert sha256_file(out) == wanted
    assert {p.name for p in tmp_path.glob("*out*")} == {"out.mp4", "out.preview.mp4", "out.preview.png"}
    assert LocalRay(command.home / "ray").status() is None  # what it started, it ended
    assert command.run(*arguments, log=log) == 0
    assert "is this video, upscaled so, already" in log.read_text()
    out.write_bytes(b"another file")
    assert command.run(*arguments, log=log) == 1
    assert "is there already; name another file, or give --overwrite" in log.read_text()
    assert not list((command.home / "store" / "videos").glob("*/upscaled-*"))  # its parts are gone


def test_a_defect_is_tried_again_and_said(tmp_path: Path, ray_home: Path) -> None:
    path, out, log = write_video(tmp_path / "x.mp4", 14), tmp_path / "out.mp4", tmp_path / "log"
    command = Command(ray_home)
    (command.home / "fail-always").touch()
    arguments = (path, out, "--model", f"{HERE}:failing", "--chunk", "4", "--workers", "1")
    assert command.run(*arguments, log=log) == 1
    assert "chunk 2 failed 3 times: a defect of this model" in log.read_text().replace("\n", " ")
    assert not out.exists()
    (command.home / "fail-always").unlink()
    (command.home / "failed-once").unlink()
    assert command.run(*arguments, log=log) == 0, log.read_text()
    assert sha256_file(out) == sha256_file(upscale_here(path, tmp_path / "store", encoding=QUICK))


def lives(pid: int) -> bool:
    """Whether a process is there, and not only waits to be buried."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def parts_done(command: Command) -> int:
    """Chunks and segments that are there."""
    return len(list((command.home / "store").glob("videos/*/*/0*")))


def kill_any(command: Command, dice: random.Random) -> str:
    """Kill one of all processes, of every kind as often; returns what it was, or nothing if it was gone already."""
    names = ("video.driver", "video.command", "ray::Worker", "raylet", "gcs_server")
    kinds: dict[str, list[psutil.Process]] = {}
    for process in command.processes():
        with suppress(psutil.Error):
            words = " ".join(process.cmdline()[:4])
            kinds.setdefault(next((name for name in names if name in words), "another of Ray's"), []).append(process)
    if not kinds:
        return ""
    kind = dice.choice(sorted(kinds))
    try:
        dice.choice(kinds[kind]).kill()
    except psutil.Error:
        return ""
    return kind


@pytest.mark.chaos
def test_ten_kills_at_random_moments(tmp_path: Path, command: Command) -> None:
    """Of any process: the command, Ray's own, the driver, the workers."""
    path, out, log = write_video(tmp_path / "x.mp4", 240, audio=[{}]), tmp_path / "out.mp4", tmp_path / "log"
    wanted = sha256_file(upscale_here(path, tmp_path / "store", encoding=QUICK))
    dice, killed, slowly = random.SystemRandom(), 0, ("--chunk", "4", "--model", f"{HERE}:slow")

    def call() -> "subprocess.Popen[bytes]":
        return command.start(path, out, *slowly, "--workers", str(dice.randint(1, 4)), log=log)

    running = call()
    while killed < 10 and not out.exists():
        moment = parts_done(command) + dice.randrange(1, 4)
        ended = running.poll
        until(lambda moment=moment, ended=ended: parts_done(command) >= moment or ended() is not None, "it gets on")
        if running.poll() is None and (victim := kill_any(command, dice)):
            killed += 1
            print(f"killed with {parts_done(command)} parts done: {victim}")
        if running.poll() is not None and not out.exists():
            running = call()
    until(lambda: running.poll() is not None, "the last call ends")
    assert out.exists() or command.run(path, out, *slowly, log=log) == 0, log.read_text()
    assert sha256_file(out) == wanted
    assert [p.name for p in tmp_path.glob("*out*")] == ["out.mp4"]
    assert killed, "a machine that is fast between two looks may get by with fewer than ten"


@pytest.mark.parametrize(
    ("result", "more", "match"),
    [
        ("out.avi", (), "the result is written as .m4v, .mkv, .mov, .mp4"),
        ("absent/out.mp4", (), "is not there; make it first"),
        ("x.mp4", (), "the source itself; name another file"),
        ("out.mp4", ("--scale", "7"), "a scale of 7 is none of 2, 3, 4"),
        ("out.mp4", ("--preset", "quickest"), "is none of x264's"),
        ("out.mp4", ("--precision", "fp8"), "is none of fp32, bf16"),
        ("out.mp4", ("--gpus-per-worker", "1.5"), "the workers of a video: "),
        ("out.mp4", ("--gpus-per-worker", "0.33333"), "the workers of a video: "),
        ("out.mp4", ("--gpus-per-worker", "1"), "bicubic is computed by CPUs: leave the GPUs out"),
        ("there.mp4", (), "is there already; name another file, or give --overwrite"),
    ],
)
def test_what_is_asked_for_is_checked_before_anything_starts(
    tmp_path: Path, result: str, more: tuple[str, ...], match: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_video(tmp_path / "x.mp4", 4)
    (tmp_path / "there.mp4").write_bytes(b"mine")
    done = CliRunner().invoke(app, ["upscale", str(path), str(tmp_path / result), *more])
    assert done.exit_code == 1
    assert match in " ".join((done.output + done.stderr + capfd.readouterr().err).split())
    assert not (tmp_path / "home" / "ray").exists()
    assert (tmp_path / "there.mp4").read_bytes() == b"mine"


def test_a_place_where_videos_cannot_be_upscaled_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path, settings = write_video(tmp_path / "x.mp4", 4), tmp_path / "settings.yaml"
    for content, variables, match in (
        ("store_claim: x", ("MLPIPES_KUBERNETES",), "Kubernetes settings, "),
        ("time: soon", ("MLPIPES_SLURM",), "write a time limit as Slurm does"),
        ("{}", ("MLPIPES_SLURM", "MLPIPES_RAY_ADDRESS"), "MLPIPES_RAY_ADDRESS="),
    ):
        settings.write_text(content)
        with monkeypatch.context() as patch:
            for variable in variables:
                patch.setenv(variable, str(settings))
            done = CliRunner().invoke(app, ["upscale", str(path), str(tmp_path / "out.mp4")])
        assert done.exit_code == 1
        assert match in " ".join((done.output + done.stderr + capfd.readouterr().err).split())
        assert not (tmp_path / "out.mp4").exists()


def test_gpus_that_are_not_there_are_told_instead_of_waited_for(ray_home: Path, tmp_path: Path) -> None:
    job = job_of(write_video(tmp_path / "x.mp4", 4), ray_home / "store", model="mlpipes_tests.video.upscalers:slow")
    job = job.model_copy(update={"gpus_per_worker": 99.0})
    with pytest.raises(
        PreflightError, match=r"a worker needs 99 GPUs, and no node of Ray has as many. It has \S+ [\d.]+ CPUs"
    ):
        follow(job, lambda: VideoRayJobs(LocalRay(ray_home / "ray").ensure()))
    assert not list(job.folder.path.glob("messages/*")), "no job was begun"
