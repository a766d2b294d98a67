"""Optimizers and learning-rate schedules that workloads choose from."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mlpipes.errors import ConfigError


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) without decay on biases, norms and other vectors."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, fused=True)


def sgd(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.9."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=weight_decay)


def muon(
    model: nn.Module, learning_rate: float, head_learning_rate: float, bias_learning_rate: float, weight_decay: float
) -> Sequence[torch.optim.Optimizer]:
    """Muon for hidden matrices, SGD for the last layer and biases, as in airbench94_muon (Jordan 2024).

    Hidden matrices are kept at a constant norm: each is followed by a batch norm, so only their direction matters, and
    a constant norm keeps the effective learning rate what it is said to be.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trainable.items() if name.endswith("head.weight")]
    hidden = [p for p in trainable.values() if p.ndim == 2 and all(p is not h for h in head)]
    rest = [p for p in trainable.values() if p.ndim != 2]
    if not hidden:
        raise ConfigError("muon needs hidden matrices, and this network has none; set the hyperparameter `optimizer`")
    matrices = torch.optim.Muon(
        hidden, lr=learning_rate, weight_decay=0.0, momentum=0.6, nesterov=True, ns_steps=3, adjust_lr_fn="original"
    )

    @torch.no_grad()
    def keep_norm(*_: Any) -> None:
        for parameter in hidden:
            parameter.mul_(len(parameter) ** 0.5 / parameter.norm())

    matrices.register_step_post_hook(keep_norm)
    vectors = torch.optim.SGD(
        [{"params": rest, "lr": bias_learning_rate}, {"params": head, "lr": head_learning_rate}],
        momentum=0.85,
        nesterov=True,
        weight_decay=weight_decay,
    )
    return [matrices, vectors]


def trapezoid(progress: float, warmup: float) -> float:
    """Learning-rate factor at a fraction of all steps: up from near 0 to 1 during `warmup`, then down to 0, linearly."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return (1 - progress) / (1 - warmup)
