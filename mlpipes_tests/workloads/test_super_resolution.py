"""Super-resolution: figures as the literature takes them, the same bits however it is run, and a program for any frame."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity
from torch import Tensor

from mlpipes.data import photographs
from mlpipes.data.bicubic import resized, resizing
from mlpipes.data.photographs import PATCH, PhotographFolder, Photographs, pictures_in, whole_pictures
from mlpipes.data.snapshot import open_snapshot
from mlpipes.data.splits import split_dataset
from mlpipes.errors import ConfigError, DataError
from mlpipes.store.outcome import Outcome
from mlpipes.training.model import deployable, evaluate, export_best, load_model
from mlpipes.training.parallel import SingleWorker
from mlpipes.training.prediction import predictions_of
from mlpipes.workloads import degradation, fidelity
from mlpipes.workloads.super_resolution import SuperResolutionHyperparameters, video_sr
from mlpipes.workloads.tensors import on_device
from mlpipes.workloads.upscalers import NETWORKS, Interpolation, upscaler
from mlpipes_tests import prepared
from mlpipes_tests.documents import page
from mlpipes_tests.training.harness import curve, make_job, run, run_here
from mlpipes_tests.workloads.drawings import columns_of, drawing

DRAWINGS = "mlpipes_tests.workloads.drawings:drawings"
SCALE = "w1-b8-e3-g0"
SMALL = {"patch": 16, "width": 8, "learning_rate": 0.01}
CPU = torch.device("cpu")


def some_drawing(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(drawing(np.random.default_rng(seed), height, width))


def figures_of(pictures: dict[str, np.ndarray], scale: int) -> dict[str, np.ndarray]:
    """Of an untrained network, for whole pictures (H, W, 3)."""
    hp = SuperResolutionHyperparameters(upscale=scale)  # pyright: ignore[reportArgumentType]
    columns = on_device(whole_pictures(pictures, 0), CPU)
    return predictions_of(
        video_sr, upscaler("espcn", scale, 1, "luma", 2, 1, "bicubic"), columns, hp, SingleWorker(), "fp32"
    )


# -- figures ----------------------------------------------------------------------------------------------------------
def test_weights_of_bicubic_are_those_of_the_kernel() -> None:
    # Keys' kernel at 1/4, 3/4, 5/4 and 7/4, halved: worked out by hand.
    half = [-0.01171875, -0.03515625, 0.11328125, 0.43359375]
    assert resizing(32, 16)[8, 13:21] == pytest.approx(half + half[::-1], abs=1e-15)
    assert resizing(32, 16).sum(axis=1) == pytest.approx(1, abs=1e-12)
    # At an end, pixels are mirrored with the last one twice.
    assert resizing(32, 16)[0, :6] == pytest.approx([0.546875, 0.3984375, 0.1015625, *half[1::-1], 0], abs=1e-15)
    assert np.array_equal(resizing(7, 7), np.eye(7))


@pytest.mark.skipif("MLPIPES_REAL_DATA" not in os.environ, reason="MLPIPES_REAL_DATA is not set: no Set5")
@pytest.mark.parametrize(("scale", "published"), [(2, 33.66), (3, 30.39), (4, 28.42)])
def test_bicubic_has_its_published_figures_on_set5(scale: int, published: float) -> None:
    found = figures_of(pictures_in(Path(os.environ["MLPIPES_REAL_DATA"]) / "super_resolution" / "Set5"), scale)
    assert len(found["bicubic_psnr_y"]) == 5
    # The papers downscaled luma, which was rounded first; here, as since EDSR, colours are.
    assert found["bicubic_psnr_y"].mean() == pytest.approx(published, abs=0.03)


def test_psnr_is_what_a_hand_computes() -> None:
    truth = torch.zeros(2, 2)
    made = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert fidelity.psnr(made, truth) == pytest.approx(10 * np.log10(65025 / 7.5), abs=1e-12)
    assert fidelity.psnr(truth, truth) == fidelity.CAP
    white, black = torch.full((3, 1, 1), 255.0), torch.zeros(3, 1, 1)
    assert [float(fidelity.luma(each)) for each in (black, white)] == pytest.approx([16, 235], abs=1e-9)


@pytest.mark.parametrize("noise", [3.0, 30.0])
def test_ssim_is_scikit_images(noise: float) -> None:
    generator = np.random.default_rng(1)
    truth = some_drawing(61, 47).double()
    made = (truth + torch.from_numpy(generator.normal(0, noise, truth.shape))).clamp(0, 255)
    expected: Any = structural_similarity(
        truth.numpy(), made.numpy(), data_range=255, channel_axis=0, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False,
    )  # fmt: skip
    assert fidelity.ssim(made, truth) == pytest.approx(expected, abs=1e-9)
    with pytest.raises(ValueError, match="SSIM needs 11×11 pixels; these planes have 8×20"):
        fidelity.ssim(torch.zeros(8, 20), torch.zeros(8, 20))


def test_only_what_is_real_of_a_picture_counts() -> None:
    small, large = (np.asarray(some_drawing(*size)).transpose(1, 2, 0) for size in ((45, 52), (80, 97)))
    together, alone = figures_of({"a": small, "b": large}, 3), figures_of({"a": small}, 3)
    for name, values in alone.items():
        assert values[0] == pytest.approx(together[name][0], abs=1e-5), name


# -- networks and motion ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_interpolation_is_bicubic_but_for_the_edges(scale: int) -> None:
    picture = some_drawing(20, 17)
    expected = torch.from_numpy(resized(picture.permute(1, 2, 0).numpy(), 20 * scale, 17 * scale)).permute(2, 0, 1)
    found = Interpolation(scale, "bicubic")(picture[None].float())[0].round().clamp(0, 255)
    inner = 2 * scale
    assert torch.equal(fidelity.shaved(found, inner), fidelity.shaved(expected.float(), inner))
    nearest = Interpolation(scale, "nearest")(picture[None].float())[0]
    assert torch.equal(nearest, picture.float().repeat_interleave(scale, 1).repeat_interleave(scale, 2))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("colour", ["luma", "rgb"])
def test_an_untrained_network_is_its_interpolation_and_no_pixel_depends_on_more_than_its_reach(
    name: str, colour: str
) -> None:
    model = upscaler(name, 2, 3, colour, 4, 2, "bicubic").eval()
    frames = torch.stack([some_drawing(40, 44, seed) for seed in range(3)])[None].float()
    with torch.no_grad():
        assert torch.equal(model(frames), model.interpolated(frames))
        for parameter in model.body.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        changed = frames.clone()
        changed[..., 20, 22] += 50
        where = (model(changed) - model(frames)).abs().amax((0, 1)).nonzero() // 2 - torch.tensor([20, 22])
    assert where.abs().max() == model.reach


def test_a_still_picture_has_what_a_moved_one_shows_where_the_flow_says() -> None:
    picture = torch.from_numpy(resized(some_drawing(30, 34).permute(1, 2, 0).numpy(), 90, 102)).permute(2, 0, 1)
    for number in (1, 2, 5):
        motion = degradation.settled_motion(number)
        before, after = (
            fidelity.luma(picture[None])[0],
            fidelity.luma(degradation.moved(picture[None], motion[None], 1))[0],
        )
        flow = degradation.flow_of(motion, 90, 102, 1)
        assert fidelity.warping_error(before, after, flow, 8) < 0.6  # rounding
        assert fidelity.warping_error(before, after, -flow, 8) > 3
    assert torch.equal(degradation.moved(picture[None], motion[None], 0)[0], picture.float())


# -- data -------------------------------------------------------------------------------------------------------------
def test_no_pixel_of_a_bundled_photograph_is_in_two_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    def numbered() -> Any:  # every pixel of every photograph has a value of its own
        for number, (height, width) in enumerate([(300, 451), (512, 512), (400, 640)]):
            places = np.arange(height * width).reshape(height, width) + number * 400_000
            yield str(number), np.stack([places >> 16, (places >> 8) & 255, places & 255], axis=-1).astype(np.uint8)

    monkeypatch.setattr(photographs, "bundled_photographs", numbered)
    splits, _ = split_dataset(Photographs().load(), video_sr.split)
    seen = {}
    for name, columns in splits.items():
        pixels = np.concatenate(
            [i[:, :h, :w].reshape(3, -1) for i, (h, w) in zip(columns["image"], columns["size"], strict=True)], axis=1
        )
        seen[name] = set((pixels.astype(np.int64) * np.array([[65536], [256], [1]])).sum(axis=0).tolist())
    assert all(seen.values())
    assert not seen["train"] & seen["validation"]
    assert not (seen["train"] | seen["validation"]) & seen["test"]
    assert sum(map(len, seen.values())) > 0.9 * (300 * 451 + 512 * 512 + 400 * 640)


def test_the_bundled_photographs_are_there_without_a_network() -> None:
    found = dict(photographs.bundled_photographs())
    assert len(found) == 2 + len(photographs.BUNDLED)
    assert all(picture.dtype == np.uint8 and picture.shape[2] == 3 for picture in found.values())


def test_a_folder_of_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPIPES_HOME", str(tmp_path / "home"))
    for folder, name, size in [
        ("own", "a.png", (200, 150)),
        ("own/more", "b.png", (150, 300)),
        ("test", "c.png", (61, 40)),
    ]:
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(np.asarray(some_drawing(size[1], size[0])).transpose(1, 2, 0)).save(tmp_path / folder / name)
    (tmp_path / "own" / "notes.txt").write_text("no image")
    dataset = PhotographFolder(tmp_path / "own", tmp_path / "test", per_side=2).load()
    train, test = dataset.splits["train"], dataset.splits["test"]
    assert train["image"].shape == (8, 3, PATCH, PATCH)
    assert train["photograph"].tolist() == [0] * 4 + [1] * 4
    assert test["size"].tolist() == [[40, 61]]
    assert dataset.facts["photographs"] == ["a.png", "more/b.png", "c.png"]
    assert "notes.txt" in dataset.provenance.notes
    (tmp_path / "own" / "broken.png").write_bytes(b"\x89PNG and no more")
    Image.new("RGB", (100, 300)).save(tmp_path / "own" / "small.png")
    with pytest.raises(
        DataError, match=r"2 of 4 images cannot be used: 'broken.png' .*'small.png' \(100×300 pixels: less"
    ):
        PhotographFolder(tmp_path / "own").load()
    Image.new("RGB", (31, 300)).save(tmp_path / "test" / "narrow.png")
    with pytest.raises(DataError, match=r"must have 32 pixels a side at least, but not so narrow.png"):
        Photographs(tmp_path / "test").load()
    with pytest.raises(DataError, match="has no image"):
        PhotographFolder(tmp_path / "home").load()
    with pytest.raises(ConfigError, match="per_side 0"):
        PhotographFolder(tmp_path, per_side=0)


# -- trained ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A network of single frames that was trained long enough to be good, and its snapshot."""
    job = make_job(tmp_path_factory.mktemp("learned"), "w1-b8-e20-g0", DRAWINGS, **(SMALL | {"width": 16}))
    run_here(job)
    return opened(job)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """The job and the outcome of a short training of clips."""
    job = make_job(tmp_path_factory.mktemp("drawings"), SCALE, DRAWINGS, frames=3, **SMALL)
    return job, run_here(job)


def opened(job: Any) -> tuple[Any, Any]:
    """The model of a finished job, and its snapshot."""
    snapshot = open_snapshot(job.snapshot)
    return load_model(export_best(job.folder, job.recipe, Outcome.read(job.folder.result)), snapshot), snapshot


def test_a_crash_and_another_number_of_workers_change_no_bit(trained: Any, tmp_path: Path) -> None:
    _, expected = trained
    job = make_job(tmp_path, SCALE, DRAWINGS, every_steps=2, frames=3, **SMALL)
    run(job, workers=2, crash=7)
    outcome = run(job, workers=2)
    assert outcome["resumed_from_step"] == 6
    assert outcome["weights_digest"] == expected["weights_digest"]
    assert curve(outcome) == curve(expected)


def test_the_report_shows_a_network_that_beats_both_baselines(learned: Any) -> None:
    model, snapshot = learned
    report, scores = evaluate(model, snapshot, "test")
    gain = report.estimates["psnr_y_gain"]
    assert (gain.n, len(scores)) == (12, 12)
    assert gain.low > report.quantities["baseline"] == 0
    assert report.estimates["psnr_y"].value == pytest.approx(scores.mean(), abs=1e-4)
    assert report.figures["before_and_after"].startswith(b"\x89PNG")
    beside, each, looked = report.tables
    assert [row[0] for row in beside.rows] == ["bicubic", "untrained network", "trained network"]
    assert len(each.rows) == 12
    assert all(row[4] > max(row[2], row[3]) for row in each.rows)
    ours, bicubic, truth = looked.rows[0][1:]
    assert truth < min(ours, bicubic)


def test_the_stored_program_takes_clips_of_any_size(trained: Any, tmp_path: Path) -> None:
    import mlflow

    model, snapshot = opened(trained[0])
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("sr", str(tmp_path / "artifacts")))
    with mlflow.start_run():
        logged = deployable(model, snapshot).log([])  # compares by itself
    served: Any = mlflow.pyfunc.load_model(logged.model_uri)
    about = served.metadata.metadata["super_resolution"]
    assert about == {"scale": 2, "frames": 3, "reach": model.network.reach, "network": "compact"}
    for shape in ((1, 3, 17, 23, 3), (3, 3, 64, 40, 3), (1, 3, 1, 2, 3)):
        clips = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        found = served.predict(clips)
        assert found.dtype == np.uint8
        assert found.shape == (shape[0], 2 * shape[2], 2 * shape[3], 3)
        with torch.no_grad():
            expected = model.network(torch.from_numpy(clips).permute(0, 1, 4, 2, 3)).round().clamp(0, 255)
        assert np.abs(found.astype(int) - expected.permute(0, 2, 3, 1).numpy()).max() <= 1
    # In bf16 what is added is rounded, by 1/512 of itself, but not the interpolation that it is added to.
    program, clips = mlflow.pytorch.load_model(logged.model_uri), np.full((2, 3, 16, 16, 3), 201, dtype=np.uint8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert np.abs(program(torch.from_numpy(clips)).numpy().astype(int) - served.predict(clips)).max() <= 1


@pytest.mark.parametrize(
    "hp",
    [
        {"upscale": 3, "colour": "rgb", "network": "rlfn"},
        {"upscale": 4, "network": "edsr"},
        {"upscale": 2, "network": "espcn", "frames": 5},
    ],
)
def test_other_scales_networks_and_colours_train(tmp_path: Path, hp: dict[str, Any]) -> None:
    outcome = run_here(make_job(tmp_path, "w1-b8-e1-g0", DRAWINGS, depth=1, **SMALL, **hp))
    assert np.isfinite(outcome["best"]["metrics"]["psnr_y"])


def test_a_training_crop_is_what_the_whole_picture_would_give() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, PATCH, PATCH), dtype=np.uint8)
    columns, hp = on_device(columns_of([noise]), CPU), SuperResolutionHyperparameters(patch=16, colour="rgb")
    views = [_view(torch.from_numpy(noise), turns, mirrored) for turns in range(4) for mirrored in (False, True)]
    seen = set()
    torch.manual_seed(3)
    for _ in range(40):
        batch = video_sr.batch(columns, torch.tensor([0]), hp, augment=True)
        low, high = batch["low"][0, 0], batch["high"][0]
        ((number, top, left),) = [
            (number, top, left)
            for number, view in enumerate(views)
            for top, left in (view == high[:, :1, :1]).all(dim=0).nonzero().tolist()
            if torch.equal(view[:, top : top + 32, left : left + 32].float(), high)
        ]
        seen.add(number)
        around = views[number][:, top % 2 :, left % 2 :]
        around = around[:, : around.shape[1] // 2 * 2, : around.shape[2] // 2 * 2]
        assert torch.equal(low, degradation.downscaled(around, 2)[:, top // 2 :, left // 2 :][:, :16, :16])
    assert seen == set(range(8))


def test_pictures_that_are_too_small_to_learn_from_are_an_error() -> None:
    columns = on_device(columns_of([drawing(np.random.default_rng(0), 40, 40)]), CPU)
    hp = SuperResolutionHyperparameters(upscale=4, frames=5)
    with pytest.raises(
        ConfigError, match="40×40 pixels are too small to learn ×4 of 5 frames from: they must be 64 pixels"
    ):
        video_sr.batch(columns, torch.tensor([0]), hp, augment=True)


def _view(picture: Tensor, turns: int, mirrored: bool) -> Tensor:
    return (picture.flip(2) if mirrored else picture).rot90(turns, (1, 2))


# -- what the docs show -----------------------------------------------------------------------------------------------
OWN, ASKED = page("docs/super-resolution.md").blocks("python")


def test_the_documented_workload_reads_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPIPES_HOME", str(tmp_path / "home"))
    for variable in ("MY_PHOTOGRAPHS", "MY_TEST_PHOTOGRAPHS"):
        (tmp_path / variable).mkdir()
        picture = np.asarray(some_drawing(160, 200)).transpose(1, 2, 0)
        Image.fromarray(picture).save(tmp_path / variable / "a.png")
        monkeypatch.setenv(variable, str(tmp_path / variable))
    found: dict[str, Any] = {}
    exec(OWN, found)  # noqa: S102 - our own example
    dataset = found["mine"].source.load()
    assert dataset.splits["train"]["image"].shape == (16, 3, PATCH, PATCH)
    assert dataset.splits["test"]["size"].tolist() == [[160, 200]]
    assert dataset.provenance.licence == "CC BY 4.0"


def test_the_documented_way_asks_the_champion(
    learned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    model, snapshot = learned
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(prepared.mlflow_store(tmp_path / ".mlpipes" / "mlflow" / "mlflow.db"))
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("sr", str(tmp_path / "artifacts")))
    with mlflow.start_run():
        logged = deployable(model, snapshot).log([])
    version = mlflow.register_model(logged.model_uri, "mlpipes-video_sr").version
    mlflow.MlflowClient().set_registered_model_alias("mlpipes-video_sr", "champion", version)
    capsys.readouterr()
    exec(ASKED, {})  # noqa: S102 - our own example
    about, shape = capsys.readouterr().out.splitlines()[-2:]
    assert about == str({"frames": 1, "network": "compact", "reach": model.network.reach, "scale": 2})
    assert shape == "(4, 240, 320, 3)"
