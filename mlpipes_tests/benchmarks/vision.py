"""Benchmark: our image path against torchvision + DataLoader, and the time to accuracy on CIFAR-10.

Run as `python -m mlpipes_tests.benchmarks.vision`. The same network (airbench-style, widths 32/96/96) is trained by both
paths, alternating in one process with one thread; medians of images per CPU-second and their ratio are printed. With
MLPIPES_REAL_DATA set, CIFAR-10's real images are used (else random ones), and a whole training follows. On a machine with
a GPU the same is measured on it, per second instead of per CPU-second.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from mlpipes.data.sources import Cifar10Source
from mlpipes.scales import RayScaleConfig
from mlpipes.store.training_job import Checkpointing
from mlpipes.training.checkpoints import Checkpoints
from mlpipes.training.determinism import has_native_bf16, prepare_process
from mlpipes.training.loop import Trainer
from mlpipes.training.parallel import SingleWorker
from mlpipes.workloads.base import DataInfo
from mlpipes.workloads.image_classification import cifar10
from mlpipes_tests.benchmarks.figures import record
from mlpipes_tests.benchmarks.plain import plain_steps

BATCH, ROUNDS = 512, 5
_USUAL_STATISTICS = ((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
USUAL = "torchvision + DataLoader, fp32"


def load() -> tuple[np.ndarray, np.ndarray, str]:
    """Images uint8 (N, 3, 32, 32), labels (N,), and what they are."""
    if folder := os.environ.get("MLPIPES_REAL_DATA"):
        os.environ["MLPIPES_CIFAR10"] = str(Path(folder) / "cifar10")
        dataset = Cifar10Source().load()
        columns = dataset.splits["train"]
        return columns["image"], columns["label"], f"CIFAR-10, {dataset.provenance.fidelity}"
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (5120, 3, 32, 32), np.uint8), generator.integers(0, 10, 5120), "random images"


class UsualImages(Dataset[tuple[Tensor, int]]):
    """What everyone writes: one image at a time through torchvision's transforms."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        from torchvision.transforms import v2

        self.images, self.labels = images, labels
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.RandomCrop(32, padding=2, padding_mode="reflect"),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(*_USUAL_STATISTICS),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(self.images[row].transpose(1, 2, 0)), int(self.labels[row])

    @staticmethod
    def normalized(images: np.ndarray) -> Tensor:
        """Images uint8 (N, 3, H, W) as they are judged, float32."""
        mean, std = (torch.tensor(values)[:, None, None] for values in _USUAL_STATISTICS)
        return (torch.from_numpy(images).float() / 255 - mean) / std


def usual_steps(images: np.ndarray, labels: np.ndarray, device: torch.device) -> Iterator[None]:
    """Training steps of the usual path: DataLoader, float32, NCHW; the same network and optimizers."""
    hp = cifar10.hyperparameters()
    statistics_ = {"mean": [0.0] * 3, "std": [1.0] * 3, "shape": [3, 32, 32]}
    model = cifar10.build_model(hp, DataInfo({"class_names": [str(n) for n in range(10)]}, statistics_)).to(device)
    optimizers = cifar10.optimizers(model, hp)
    loader = DataLoader(UsualImages(images, labels), BATCH, shuffle=True, drop_last=True)
    while True:
        for batch, target in loader:
            for optimizer in optimizers:
                optimizer.zero_grad()
            F.cross_entropy(model(batch.to(device)), target.to(device), label_smoothing=hp.label_smoothing).backward()
            for optimizer in optimizers:
                optimizer.step()
            yield


def trainer_of(
    images: np.ndarray,
    labels: np.ndarray,
    device: torch.device,
    folder: str,
    epochs: int,
    validation: Any = None,
    **hp: Any,
) -> Trainer:
    """Our engine on the given arrays."""
    columns = {"image": images, "label": labels}
    return Trainer(
        cifar10,
        cifar10.hyperparameters.model_validate(hp),
        RayScaleConfig(workers=1, batch_size=hp.pop("batch", BATCH), epochs=epochs),
        DataInfo({"class_names": [str(n) for n in range(10)]}, cifar10.statistics(columns)),
        columns,
        validation or {name: array[:500] for name, array in columns.items()},
        seed=0,
        workers=SingleWorker(),
        device=device,
        checkpoints=Checkpoints(Path(folder)),
        policy=Checkpointing(every_seconds=None),
        notify=lambda *_, **__: None,
    )


def our_steps(trainer: Trainer) -> Iterator[None]:
    """Training steps of our engine."""
    while True:
        trainer._step()
        yield


def images_per_second(steps: Iterator[None], clock: Callable[[], float], device: torch.device, seconds: float) -> float:
    """Images per unit of the clock over at least so many of its seconds."""
    count, began = 0, clock()
    while clock() - began < seconds:
        next(steps)
        count += BATCH
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count / (clock() - began)


def compare(device: torch.device) -> None:
    """Alternate the two paths and print medians and the ratio."""
    images, labels, what = load()
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    unit = "second" if on_gpu else "CPU-second, one thread"
    bf16 = has_native_bf16(device)
    print(f"{device}: {what}; bf16 hardware: {'yes' if bf16 else 'no'}; images per {unit}")
    with tempfile.TemporaryDirectory() as folder:
        paths = {
            USUAL: usual_steps(images, labels, device),
            "ours, fp32": our_steps(trainer_of(images, labels, device, folder, 10**6, precision="fp32")),
            "ours, auto": our_steps(trainer_of(images, labels, device, folder, 10**6)),
            "ours, auto, 1 logical shard": our_steps(
                trainer_of(images, labels, device, folder, 10**6, logical_shards=1)
            ),
            "ours, auto, in a plain loop": plain_steps(trainer_of(images, labels, device, folder, 10**6)),
        }
        found: dict[str, list[float]] = {name: [] for name in paths}
        for steps in paths.values():
            images_per_second(steps, clock, device, 1.0)  # warm-up
        for _ in range(ROUNDS):
            for name, steps in paths.items():
                # The usual path does without our deterministic kernels.
                torch.use_deterministic_algorithms(name != USUAL)
                found[name].append(images_per_second(steps, clock, device, 4.0))
    medians = {name: statistics.median(values) for name, values in found.items()}
    usual = medians[USUAL]
    for name, values in found.items():
        record(f"{device}, {name}", f"images a {unit}", values)
        spread = f"{min(values):.0f}–{max(values):.0f}"
        print(f"  {name:32s} {medians[name]:9.0f}  ({spread}, {ROUNDS} rounds)  {medians[name] / usual:5.2f}×")
    print(f"  the engine ÷ a plain loop: {medians['ours, auto'] / medians['ours, auto, in a plain loop']:.2f}")
    goal = 2.5 if bf16 else 1.4
    reached = medians["ours, auto"] / usual
    print(f"  goal ≥ {goal}×: {'reached' if reached >= goal else 'MISSED'} ({reached:.2f}×)")


def time_to_accuracy(device: torch.device, epochs: int) -> None:
    """Train on CIFAR-10's training images, judge on its test images, and print accuracy and seconds."""
    dataset = Cifar10Source().load()
    train, test = dataset.splits["train"], dataset.splits["test"]
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(train["image"], train["label"], device, folder, epochs, validation=test)
        began = clock()
        outcome = trainer.run()
        seconds = clock() - began
    last: nn.Module = trainer.model
    accuracy = [value for name, value, _, _ in outcome.history if name == "validation/accuracy"][-1]
    print(
        f"{device}: {dataset.provenance.fidelity}; {epochs} epochs, batch {BATCH}, {outcome.precision}, "
        f"{sum(p.numel() for p in last.parameters()):,} parameters: test accuracy {accuracy:.4f} "
        f"(n={len(test['label'])}, last epoch, no selection) after {seconds:.1f} {'s' if device.type == 'cuda' else 'CPU-s'}"
    )


def main() -> None:
    """Measure on the CPU, and on the GPU if there is one."""
    prepare_process(threads=1, seed=0)
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    for device in devices:
        compare(device)
        if os.environ.get("MLPIPES_REAL_DATA"):
            time_to_accuracy(device, epochs=12)


if __name__ == "__main__":
    main()
