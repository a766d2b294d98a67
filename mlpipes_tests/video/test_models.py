"""Models: pinned with their bytes, loaded as they were, applied in tiles without seams and with a frame's neighbours."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mlpipes.errors import ConfigError
from mlpipes.store.layout import Store
from mlpipes.video.chunks import UPSCALED, cut, frames_in, need_chunk
from mlpipes.video.job import ModelPin
from mlpipes.video.models import load, pin
from mlpipes.video.program import Program
from mlpipes.video.upscaling import upscale_chunk
from mlpipes_tests.video.made import job_of, picture, upscale_here, write_video

REACH = 3


class Small(nn.Module):
    """Three layers and a shuffle, as small networks for video have them."""

    def __init__(self, scale: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = scale
        layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(16, 3 * scale * scale, 3, padding=1), nn.PixelShuffle(scale))

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        x = frames.permute(0, 3, 1, 2).float() / 255
        base = nn.functional.interpolate(x, scale_factor=self.scale, mode="nearest")
        made = (base + self.body(x)).clamp(0, 1) * 255
        return made.round().to(torch.uint8).permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network as an exported program."""
    path = tmp_path_factory.mktemp("model") / "model.pt2"
    sizes = dict.fromkeys(range(3), torch.export.Dim.AUTO)
    example = torch.zeros((2, 20, 24, 3), dtype=torch.uint8)
    torch.export.save(torch.export.export(Small(), (example,), dynamic_shapes={"frames": sizes}), path)
    return path


def pinned(reach: int = REACH, precision: str = "fp32") -> ModelPin:
    return ModelPin(name="x", kind="program", digest="x", scale=2, reach=reach, precision=precision)


def test_tiles_have_no_seams(program: Path) -> None:
    frames = np.stack([picture(n, 100, 70) for n in range(2)])
    whole = Program(program, pinned(), tile=(1000, 1000))(frames)
    assert whole.shape == (2, 140, 200, 3)
    tiled = Program(program, pinned(), tile=(32, 40))(frames)
    assert np.abs(whole.astype(int) - tiled).max() <= 1  # kernels may round differently in another size
    seams = Program(program, pinned(reach=0), tile=(32, 40))(frames)
    assert np.abs(whole.astype(int) - seams).max() > 5  # this is what the overlap is for


def test_bf16_is_near(program: Path) -> None:
    frames = np.stack([picture(n) for n in range(4)])
    exact, near = (Program(program, pinned(precision=p))(frames).astype(float) for p in ("fp32", "bf16"))
    assert 10 * np.log10(255**2 / ((exact - near) ** 2).mean()) > 45


@pytest.mark.parametrize("native", [True, False])
def test_bf16_on_a_processor_without_it_is_said_to_be_slow(
    native: bool, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlpipes.video.program.has_native_bf16", lambda device: native)
    assert ("not in this processor" in Program(program, pinned(precision="bf16")).caveat) == (not native)
    assert not Program(program, pinned()).caveat


class Casting(nn.Module):
    """Refuses anything but fp32 in its middle, as a program does that was exported with a cast."""

    scale = 2

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        x = self.first(frames.permute(0, 3, 1, 2).float())
        torch._check(x.dtype == torch.float32, lambda: "expected fp32")
        x = nn.functional.interpolate(self.second(x.to(torch.float32)), scale_factor=2, mode="nearest")
        return x.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def test_a_model_that_cannot_compute_in_bf16_says_so(tmp_path: Path) -> None:
    sizes = dict.fromkeys(range(3), torch.export.Dim.AUTO)
    example = torch.zeros((2, 20, 24, 3), dtype=torch.uint8)
    exported = torch.export.export(Casting(), (example,), dynamic_shapes={"frames": sizes})
    torch.export.save(exported, tmp_path / "model.pt2")
    frames = np.stack([picture(0)])
    assert Program(tmp_path / "model.pt2", pinned())(frames).shape == (1, 96, 128, 3)
    with pytest.raises(ConfigError, match=r"x cannot compute in bf16 .*; use the precision fp32"):
        Program(tmp_path / "model.pt2", pinned(precision="bf16"))(frames)


def test_neighbours_across_chunks_and_at_both_ends(tmp_path: Path) -> None:
    """Each frame sees the one before and the one behind it; the first and the last one see themselves."""
    path = write_video(tmp_path / "x.mkv", 13, codec="ffv1", pix_fmt="yuv444p")
    job = job_of(path, tmp_path / "store", chunk=4, model="mlpipes_tests.video.upscalers:neighbours")
    assert job.model.frames == 3
    plan, model = cut(job), load(job.model, Store(tmp_path / "store"))
    from mlpipes.video.colour import Converter

    number = 0
    for index in range(plan.chunks):
        upscale_chunk(job, plan, index, model)
        for frame in frames_in(need_chunk(job.folder.upscaled_chunk(index), UPSCALED)):
            found = Converter(job.source.colour).to_rgb(frame)[::2, ::2].astype(int)
            before, behind = max(0, number - 1), min(12, number + 1)
            wanted = [picture(n)[..., c].astype(int) for c, n in enumerate((before, number, behind))]
            # Rounded to YUV twice on the way; a wrong neighbour is further off by far.
            assert np.abs(found - np.stack(wanted, -1))[2:-2, 2:-2].mean() < 3
            number += 1
    assert number == 13


def test_what_is_no_model(tmp_path: Path) -> None:
    store, here = Store(tmp_path), "mlpipes_tests.video.upscalers"
    for spec, scale, match in [
        ("cubic", None, "is no model: write bicubic"),
        ("bicubic", 5, "a scale of 5 is none of 2, 3, 4"),
        (f"{here}:absent", None, "cannot be imported"),
        (f"{here}:wait_at", None, "is no upscaler: it must be callable, and have a `scale`"),
        (f"{here}:gated", 3, "upscales ×2, and ×3 was asked for"),
    ]:
        with pytest.raises(ConfigError, match=match):
            pin(spec, scale, store)
    with pytest.raises(ConfigError, match="a precision of 'fp16' is none of"):
        pin("bicubic", 2, store, precision="fp16")


def test_a_model_that_answers_with_something_else(tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.mp4", 3)
    with pytest.raises(ConfigError, match=r"answered with uint8 \[4, 48, 64, 3\].*expected uint8 \[4, 96, 128, 3\]"):
        upscale_here(path, tmp_path / "store", model="mlpipes_tests.video.upscalers:wrong_size")


def test_a_registered_model_is_pinned_with_its_bytes(tmp_path: Path) -> None:
    """Its alias may go to another version meanwhile: the video keeps the one that it began with."""
    import mlflow

    from mlpipes.tracking.runs import Tracker

    tracker, store = Tracker(f"sqlite:///{tmp_path}/mlflow.db"), Store(tmp_path / "store")
    mlflow.set_tracking_uri(tracker.uri)
    mlflow.set_registry_uri(tracker.uri)
    experiment = mlflow.create_experiment("x", artifact_location=str(tmp_path / "artifacts"))
    frames = np.stack([picture(n) for n in range(4)])
    for scale in (2, 3):
        with mlflow.start_run(experiment_id=experiment):
            mlflow.pytorch.log_model(
                Small(scale).eval(),
                name="model",
                registered_model_name="small",
                input_example=frames,
                serialization_format="pt2",
                pip_requirements=["torch"],
                metadata={"super_resolution": {"scale": scale, "frames": 1, "reach": REACH}},
            )
    tracker.client.set_registered_model_alias("small", "champion", "1")
    first = pin("models:/small@champion", None, store, tracker=tracker)
    assert (first.name, first.scale, first.reach) == ("models:/small/1", 2, REACH)
    tracker.client.set_registered_model_alias("small", "champion", "2")
    assert pin("models:/small@champion", 3, store, tracker=tracker).name == "models:/small/2"
    assert np.array_equal(load(first, store)(frames), Small(2)(torch.from_numpy(frames)).numpy())
    with pytest.raises(ConfigError, match="upscales ×3, and ×2 was asked for"):
        pin("models:/small@champion", 2, store, tracker=tracker)
    with pytest.raises(ConfigError, match="is not registered in MLflow"):
        pin("models:/absent@champion", None, store, tracker=tracker)
    with pytest.raises(ConfigError, match="write models:/name@champion or models:/name/3"):
        pin("models:/small", None, store, tracker=tracker)
