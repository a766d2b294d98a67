"""Networks for images: a small one for digits, an airbench-style one and ResNet-18 for 32×32 photographs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Normalized(nn.Module):
    """A network behind a fixed per-channel normalization, so that a saved model takes raw pixels."""

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        # Frozen parameters: weights that no step changes.
        self.mean = nn.Parameter(torch.tensor(mean)[:, None, None], requires_grad=False)
        self.scale = nn.Parameter(1 / torch.tensor(std)[:, None, None], requires_grad=False)
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Raw pixels (B, C, H, W), any number type, to logits (B, classes)."""
        return self.network((images.float() - self.mean) * self.scale)


class GlobalMax(nn.Module):
    """The maximum of each map, as AdaptiveMaxPool2d(1), whose backward pass has no deterministic kernel on GPUs."""

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 1, 1)."""
        return F.max_pool2d(maps, maps.shape[-2:])


def digits_network(channels: int, classes: int, width: int) -> nn.Module:
    """Three convolutions and a global maximum for 8×8 images; 76,000 parameters at width 32."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(channels, width),
        *block(width, 2 * width),
        nn.MaxPool2d(2),
        *block(2 * width, 2 * width),
        GlobalMax(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(2 * width, classes),
    )


class MatrixConv2d(nn.Module):
    """A 3×3 convolution without bias whose weight is stored as the matrix that Muon orthogonalizes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        weight = torch.empty(outputs, inputs, 3, 3)
        nn.init.kaiming_uniform_(weight, a=5**0.5)
        nn.init.dirac_(weight[:inputs])  # the first channels start as the identity (airbench)
        self.weight = nn.Parameter(weight.flatten(1))
        self.inputs = inputs

    def forward(self, images: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W)."""
        return F.conv2d(images, self.weight.view(-1, self.inputs, 3, 3), padding=1)


def _norm(channels: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels, eps=1e-5, momentum=0.4)
    layer.weight.requires_grad_(False)
    return layer


class Whitening(nn.Conv2d):
    """A frozen 2×2 convolution onto the principal axes of image patches, each axis with both signs."""

    def __init__(self, channels: int) -> None:
        # No bias, which airbench trains for its first epochs: it alone would make the backward pass reach the input of
        # the largest convolution.
        super().__init__(channels, 2 * channels * 4, 2, bias=False)
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def fit(self, images: Tensor, eps: float = 5e-4) -> None:
        """Set the weights from normalized images (N, C, H, W) float."""
        patches = (
            images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, images.shape[1] * 4).double()
        )
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        # An eigenvector's sign is arbitrary; fixing it makes the result the same on every machine and LAPACK.
        signs = torch.sign(vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)))
        axes = (vectors * signs / (values + eps).sqrt()).T.reshape(-1, images.shape[1], 2, 2).flip(0).float()
        self.weight.copy_(torch.cat([axes, -axes]))


class AirNetwork(nn.Module):
    """A whitened VGG-like network for 32×32 images, after Keller Jordan's airbench94 (arXiv:2404.00498)."""

    def __init__(self, channels: int, classes: int, widths: tuple[int, int, int]) -> None:
        super().__init__()
        self.whiten = Whitening(channels)
        layers: list[nn.Module] = []
        inputs = self.whiten.out_channels
        for width in widths:
            layers += [MatrixConv2d(inputs, width), nn.MaxPool2d(2), _norm(width), nn.GELU()]
            layers += [MatrixConv2d(width, width), _norm(width), nn.GELU()]
            inputs = width
        self.body = nn.Sequential(*layers, GlobalMax(), nn.Flatten())
        self.head = nn.Linear(inputs, classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (B, C, H, W) of at least 12 pixels a side to logits (B, classes)."""
        return self.head(self.body(F.gelu(self.whiten(images)))) / 9


def resnet18(channels: int, classes: int) -> nn.Module:
    """torchvision's ResNet-18 with the small-image stem: a 3×3 first convolution, no pooling (He et al. 2015)."""
    from torchvision.models import resnet18 as build

    network: Any = build(num_classes=classes)
    network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network
