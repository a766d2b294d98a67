"""The engine computes what a textbook loop computes: loss, gradient and update of every step, from the same weights.

Two trainings that round differently drift apart, whichever of them is right: a max-pooling's winner among near-equals, or
the side of a kink, is decided by the last bit. So steps are compared and not epochs, and the textbook, in float64, starts
each from what the engine has: its weights for the gradient, its gradient and memory for the update. The networks here are
smooth, so a difference is rounding times a small factor, on any CPU.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlpipes.data.snapshot import open_snapshot
from mlpipes.training.determinism import prepare_process
from mlpipes.training.gradient import ShardedGradient
from mlpipes.training.loop import Trainer
from mlpipes.workloads.base import DataInfo
from mlpipes.workloads.image_classification import DigitsHyperparameters, ImageClassification, digits
from mlpipes.workloads.networks import Normalized
from mlpipes_tests.training.harness import make_job, trainer_on

PEAK, DECAY, WARMUP, SMOOTHING, CLIP, BATCH = 0.05, 0.02, 0.2, 0.05, 0.8, 64
ROUNDING = {"loss": 1e-6, "gradient": 3e-5, "weights": 1e-6}
"""Limits for differences, as shares of a tensor's greatest value. The worst gradient seen is 1.2e-5 off, below a batch
normalisation, which subtracts large sums from each other."""


class Smooth(ImageClassification):
    """Digits with a network that has neither kinks nor near-ties, and a limit on the gradient."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__(digits.source, digits.split, DigitsHyperparameters)
        self.norm = norm

    def build_model(self, hp: Any, info: DataInfo) -> nn.Module:
        network = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1, bias=False), self.norm(8), nn.Tanh(), nn.AvgPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1, bias=False), self.norm(16), nn.GELU(), nn.AvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(64, 10)),
        )
        return Normalized(network, info.statistics["mean"], info.statistics["std"])

    def gradient_clip(self, hp: Any) -> float:
        return CLIP


def groups_of_channels(channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels)


@pytest.fixture(autouse=True)
def as_a_worker() -> Iterator[None]:
    threads = torch.get_num_threads()
    prepare_process(1, 0)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    def made(norm: Callable[[int], nn.Module] = groups_of_channels, shards: int = 4, optimizer: str = "sgd") -> Trainer:
        snapshot = open_snapshot(make_job(tmp_path, f"w1-b{BATCH}-e1-g0").snapshot)
        hp = DigitsHyperparameters(
            optimizer=optimizer,  # pyright: ignore[reportArgumentType] - one of its names
            logical_shards=shards,
            learning_rate=PEAK,
            weight_decay=DECAY,
            warmup=WARMUP,
            label_smoothing=SMOOTHING,
            affine=False,
        )
        return trainer_on(snapshot, Smooth(norm), hp, f"w1-b{BATCH}-e1-g0", tmp_path / "checkpoints", seed=1)

    return made


def furthest(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The greatest difference in any tensor, as a share of the greatest value in it."""
    assert found.keys() == expected.keys()
    pairs = [(found[name].detach().double(), expected[name].detach()) for name in found]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in trainable(model).items() if p.grad is not None}


def textbook_optimizer(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    """As the recipes say it: Nesterov's momentum, or AdamW without decay of vectors."""
    parameters = list(trainable(model).values())
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=PEAK, momentum=0.9, nesterov=True, weight_decay=DECAY)
    matrices, vectors = ([p for p in parameters if (p.ndim > 1) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.999), eps=1e-8, foreach=False, fused=False)


def compare_step(trainer: Trainer, kind: str) -> dict[str, float]:
    """Let the engine take one step; how far its loss, gradient and update are from the textbook's, by name."""
    step, rows = trainer.progress.step, trainer.order.batch(0, trainer.progress.step)
    model: Any = copy.deepcopy(trainer.model).double()
    optimizer = textbook_optimizer(model, kind)
    state = copy.deepcopy(trainer.optimizers[0].state_dict()["state"])  # loading turns it into float64
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    trainer._step()

    images, labels = (trainer.train_columns[name][rows] for name in ("image", "label"))
    with torch.no_grad():  # Normalized makes float32 of pixels
        pixels = (images.double() - model.mean) * model.scale
    loss = F.cross_entropy(model.network(pixels), labels, label_smoothing=SMOOTHING)
    loss.backward()
    nn.utils.clip_grad_norm_(trainable(model).values(), CLIP, foreach=False)
    found = {
        "loss": abs(float(trainer._undrained[-1][0]) / float(loss.detach()) - 1),
        "gradient": furthest(gradients(trainer.model), gradients(model)),
    }

    progress = step / trainer.total_steps
    factor = (progress + 1e-3) / (WARMUP + 1e-3) if progress < WARMUP else (1 - progress) / (1 - WARMUP)
    for group in optimizer.param_groups:
        group["lr"] = PEAK * factor
    for name, gradient in gradients(trainer.model).items():
        trainable(model)[name].grad = gradient.double()
    optimizer.step()
    # Of the weights and not of their change, which is itself rounded to the weights' last bit.
    found["weights"] = furthest(trainable(trainer.model), trainable(model))
    return found


def compare_epoch(trainer: Trainer, kind: str = "sgd") -> dict[str, float]:
    """The greatest differences in an epoch: warm-up, peak and decay."""
    steps = [compare_step(trainer, kind) for _ in range(trainer.total_steps)]
    return {name: max(step[name] for step in steps) for name in ROUNDING}


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize(("norm", "shards"), [(nn.BatchNorm2d, 1), (groups_of_channels, 4)])
def test_every_step_is_the_textbooks(
    make_trainer: Callable[..., Trainer], norm: Callable[[int], nn.Module], shards: int, kind: str
) -> None:
    """Batch normalisation sees a shard and not the batch, so it is the textbook's with one shard only."""
    worst = compare_epoch(make_trainer(norm, shards, kind), kind)
    assert all(worst[name] < limit for name, limit in ROUNDING.items()), worst


def _mean_of_a_shard(patch: pytest.MonkeyPatch) -> None:
    def backward(gradient: ShardedGradient, parts: Any, batch_size: int) -> Tensor:
        return right(gradient, parts, batch_size // 4)

    right = ShardedGradient._backward
    patch.setattr(ShardedGradient, "_backward", backward)


def _no_clip(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Smooth, "gradient_clip", lambda self, hp: None)


def _another_schedule(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Smooth, "learning_rate_factor", lambda self, progress, hp: 1 - progress)


def _a_step_late(patch: pytest.MonkeyPatch) -> None:
    right = Smooth.learning_rate_factor
    patch.setattr(Smooth, "learning_rate_factor", lambda self, progress, hp: right(self, max(0, progress - 1 / 19), hp))


def _no_momentum(patch: pytest.MonkeyPatch) -> None:
    step = Trainer._step

    def forgetful(trainer: Trainer) -> None:
        trainer.optimizers[0].state.clear()
        step(trainer)

    patch.setattr(Trainer, "_step", forgetful)


def _a_lost_shard(patch: pytest.MonkeyPatch) -> None:
    right = Trainer._shard_losses

    def losses(trainer: Trainer, shard: int, rows: Tensor) -> Iterator[tuple[Tensor, Tensor | float]]:
        for loss, weight in right(trainer, shard, rows):
            yield loss * (shard != 3), weight

    patch.setattr(Trainer, "_shard_losses", losses)


@pytest.mark.parametrize(
    ("damage", "seen"),
    [
        (_mean_of_a_shard, {"loss", "gradient"}),
        (_a_lost_shard, {"loss", "gradient"}),
        (_no_clip, {"gradient"}),
        (_another_schedule, {"weights"}),
        (_a_step_late, {"weights"}),
        (_no_momentum, {"weights"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_broken_engine_is_noticed(
    make_trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[pytest.MonkeyPatch], None],
    seen: set[str],
) -> None:
    damage(monkeypatch)
    worst = compare_epoch(make_trainer())
    assert {name for name, limit in ROUNDING.items() if worst[name] > 100 * limit} == seen
