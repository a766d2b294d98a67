"""Benchmark: super-resolution trained on the bundled photographs, judged on Set5 and Set14 beside the literature.

Run as `python -m mlpipes_tests.benchmarks.super_resolution [--epochs 28] [--folder PHOTOGRAPHS] [name=value …]`, with
MLPIPES_REAL_DATA set; `name=value` are hyperparameters. One thread; CPU-seconds are those of training steps. The test sets
are read after training, and only then. `--folder` trains on a folder of one's own, such as BSD or DIV2K, instead.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from mlpipes.data.class_folders import images_below
from mlpipes.data.photographs import PhotographFolder, pictures_in, whole_pictures
from mlpipes.data.snapshot import snapshot_of
from mlpipes.data.splits import SplitPlan
from mlpipes.store.layout import Store
from mlpipes.training.determinism import prepare_process
from mlpipes.training.parallel import SingleWorker
from mlpipes.training.prediction import predictions_of
from mlpipes.workloads.super_resolution import SuperResolution, video_sr
from mlpipes.workloads.tensors import on_device
from mlpipes_tests.training.harness import trainer_on

LITERATURE = {
    2: {"FSRCNN": (37.00, 32.63), "EDSR-baseline": (37.99, 33.57)},
    3: {"FSRCNN": (33.16, 29.43), "EDSR-baseline": (34.37, 30.28)},
    4: {"FSRCNN": (30.71, 27.59), "EDSR-baseline": (32.09, 28.58)},
}
"""PSNR on Y in dB on Set5 and Set14 (Dong et al. 2016; Lim et al. 2017 and its repository)."""
SETS = ("Set5", "Set14")


class EightViews(nn.Module):
    """The mean over the eight turned and mirrored views of a frame ("self-ensemble", Timofte et al. 2016)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.interpolated = model, model.interpolated

    def forward(self, frames: Tensor) -> Tensor:
        found = []
        for turns in range(4):
            for mirrored in (False, True):
                seen = frames.rot90(turns, (3, 4))
                made = self.model(seen.flip(4) if mirrored else seen)
                found.append((made.flip(3) if mirrored else made).rot90(-turns, (2, 3)))
        return torch.stack(found).mean(dim=0)


def judged(model: nn.Module, hp: Any, name: str) -> Mapping[str, np.ndarray]:
    """Figures of each photograph of a test set, in fp32."""
    folder = Path(os.environ["MLPIPES_REAL_DATA"]) / "super_resolution" / name
    columns = on_device(whole_pictures(pictures_in(folder), 0), torch.device("cpu"))
    return as_published(predictions_of(video_sr, model, columns, hp, SingleWorker(), "fp32"), name)


def as_published(figures: Mapping[str, np.ndarray], name: str) -> Mapping[str, np.ndarray]:
    """The same with the grey value for luma where a file is grey, as the literature's programs have it (Set14's bridge).

    Luma has 219 levels for the grey value's 255, so its errors are smaller.
    """
    paths, _ = images_below(Path(os.environ["MLPIPES_REAL_DATA"]) / "super_resolution" / name)
    lost = np.array([20 * np.log10(255 / 219) * (Image.open(path).mode == "L") for path in paths])
    return {key: values - lost if key.endswith("psnr_y") else values for key, values in figures.items()}


def mean(figures: Mapping[str, np.ndarray], name: str) -> str:
    """A figure's mean over photographs, as text."""
    return f"{figures[name].mean():.4f}" if "ssim" in name else f"{figures[name].mean():.2f}"


def main() -> None:
    """Train, judge, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=28)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder")
    parser.add_argument("settings", nargs="*", help="hyperparameters, name=value")
    arguments = parser.parse_args()
    if "MLPIPES_REAL_DATA" not in os.environ:
        parser.error("MLPIPES_REAL_DATA is not set: no Set5 and Set14 to judge on")
    prepare_process(threads=1, seed=0)
    split = SplitPlan(0.05, test_fraction=0.05, group_by="region", content=("image",))
    workload = SuperResolution(PhotographFolder(arguments.folder), split) if arguments.folder else video_sr
    settings = {name: yaml.safe_load(value) for name, value in (each.split("=", 1) for each in arguments.settings)}
    hp = workload.hyperparameters.model_validate(settings)
    with tempfile.TemporaryDirectory() as folder:
        snapshot, _ = snapshot_of(Store(Path(folder)), workload.source.load().digest(), workload)
        scale = f"w1-b{arguments.batch}-e{arguments.epochs}-g0"
        trainer = trainer_on(snapshot, workload, hp, scale, Path(folder) / "checkpoints", seed=arguments.seed)
        outcome = trainer.run()
    assert outcome.usage is not None
    seconds = outcome.usage.cpu_seconds_per_second * outcome.train_seconds
    last = ", ".join(f"{name} {value:.4f}" for name, value, _, _ in outcome.history[-6:] if "validation" in name)
    print(
        f"{snapshot.meta['provenance']['name']}: {snapshot.counts}; {settings or 'as set by default'}; "
        f"seed {arguments.seed}; {outcome.parameters:,} parameters; {outcome.steps} steps of {arguments.batch} in "
        f"{seconds:.1f} CPU-s ({1000 * seconds / outcome.steps:.1f} CPU-ms each), {outcome.precision}; last epoch: {last}"
    )
    model = trainer.model.eval()
    for name in SETS:
        began, found = time.process_time(), judged(model, hp, name)
        took, views = time.process_time() - began, judged(EightViews(model), hp, name)
        other = {who: figures[SETS.index(name)] for who, figures in LITERATURE[hp.upscale].items()}
        print(
            f"{name} ×{hp.upscale} (n={len(found['psnr_y'])}), PSNR Y dB / SSIM Y / PSNR RGB dB: "
            f"bicubic {mean(found, 'bicubic_psnr_y')} / {mean(found, 'bicubic_ssim_y')} / "
            f"{mean(found, 'bicubic_psnr_rgb')}; "
            f"untrained {mean(found, 'untrained_psnr_y')}; "
            f"trained {mean(found, 'psnr_y')} / {mean(found, 'ssim_y')} / {mean(found, 'psnr_rgb')}; "
            f"published, PSNR Y: {', '.join(f'{who} {value:.2f}' for who, value in other.items())}; "
            f"apart, with self-ensemble of 8: {mean(views, 'psnr_y')} ({took:.1f} CPU-s without)"
        )
        print("   ", ", ".join(f"{each:.2f}" for each in found["psnr_y"]))


if __name__ == "__main__":
    main()
