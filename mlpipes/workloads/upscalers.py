"""Networks that upscale frames: ESPCN, SRVGG, EDSR and RLFN, each as what is added to an interpolation."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlpipes.data.bicubic import resizing

LUMA = (65.481 / 255, 128.553 / 255, 24.966 / 255)
"""BT.601's luma of full-range red, green and blue, in limited range (16 is black, 235 white); an offset of 16 is added."""
_REACH = 2


class Interpolation(nn.Module):
    """Enlarges planes by a whole number with fixed weights: bicubic as `imresize`, or nearest; edge pixels are repeated."""

    def __init__(self, scale: int, kind: str) -> None:
        super().__init__()
        taps = 2 * _REACH + 1
        if kind == "bicubic":  # of a line that is long enough, the rows and columns of its middle
            middle = 2 * taps
            lines = resizing(2 * middle, 2 * middle * scale)[middle * scale : (middle + 1) * scale]
            lines = lines[:, middle - _REACH : middle + _REACH + 1]
        else:
            lines = np.tile(np.arange(taps) == _REACH, (scale, 1))
        line = torch.from_numpy(lines.astype(np.float32))
        weights = torch.einsum("ai,bj->abij", line, line).reshape(scale**2, 1, taps, taps)
        # A frozen parameter: weights that no step changes.
        self.weights = nn.Parameter(weights, requires_grad=False)
        self.scale = scale

    def forward(self, planes: Tensor) -> Tensor:
        """(B, C, H, W) float32 to (B, C, scale·H, scale·W)."""
        batch, channels, height, width = planes.shape
        padded = F.pad(planes.reshape(batch * channels, 1, height, width), (_REACH,) * 4, mode="replicate")
        with torch.autocast(planes.device.type, enabled=False):  # bf16 would round pixels to half a level
            phases = F.conv2d(padded, self.weights)
        return F.pixel_shuffle(phases, self.scale).reshape(batch, channels, height * self.scale, width * self.scale)


class Upscaler(nn.Module):
    """The frame in the middle, interpolated, and what a network of all frames adds; at first it adds nothing.

    `planes` is 1 for a network of luma, which adds the same to red, green and blue, and 3 for one of colours.
    """

    def __init__(self, body: nn.Module, scale: int, planes: int, skip: str, reach: int) -> None:
        super().__init__()
        self.body, self.skip, self.planes = body, Interpolation(scale, skip), planes
        self.reach = max(reach, _REACH)
        """How many low-resolution pixels around it an output pixel depends on."""
        last = [layer for layer in body.modules() if isinstance(layer, nn.Conv2d)][-1]
        nn.init.zeros_(last.weight)
        assert last.bias is not None  # noqa: S101 - all have one
        nn.init.zeros_(last.bias)
        self.luma = nn.Parameter(torch.tensor(LUMA)[:, None, None], requires_grad=False)

    def interpolated(self, frames: Tensor) -> Tensor:
        """Frames (B, T, C, H, W), levels 0 to 255, to what the untrained network makes of them (B, C, sH, sW)."""
        return self.skip(frames[:, frames.shape[1] // 2].float())

    def forward(self, frames: Tensor) -> Tensor:
        """Colours (B, T, 3, H, W), levels 0 to 255, to (B, 3, sH, sW) float32, neither rounded nor clipped.

        A network of luma also takes luma alone (B, T, 1, H, W), and answers with luma.
        """
        seen, share = frames.float(), 1.0
        if self.planes == 1 and frames.shape[2] == 3:
            # A change of luma alone, chroma kept, changes each colour by as much, which has 255 levels for luma's 219.
            seen, share = (seen * self.luma).sum(2, keepdim=True) + 16, 255 / 219
        # Under autocast in bf16, which the sum with float32 ends: a cast would keep an exported program from it.
        added = self.body(((seen - 128) / 128).flatten(1, 2)) * (128 * share)
        return self.interpolated(frames) + F.pixel_shuffle(added, self.skip.scale)


def _conv(inputs: int, outputs: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


def _active(channels: int) -> nn.PReLU:
    return nn.PReLU(channels, init=0.2)


def espcn(inputs: int, outputs: int, width: int, depth: int) -> tuple[nn.Module, int]:
    """A 5×5 and `depth` 3×3 convolutions, the first twice as wide (Shi et al. 2016, arXiv:1609.05158), and their reach."""
    layers: list[nn.Module] = [_conv(inputs, 2 * width, 5), _active(2 * width)]
    for number in range(depth):
        layers += [_conv(width if number else 2 * width, width), _active(width)]
    return nn.Sequential(*layers, _conv(width, outputs)), 2 + depth + 1


def compact(inputs: int, outputs: int, width: int, depth: int) -> tuple[nn.Module, int]:
    """`depth` + 1 convolutions of one width, as SRVGGNetCompact of Real-ESRGAN (Wang et al. 2021), and their reach."""
    layers: list[nn.Module] = [_conv(inputs, width), _active(width)]
    for _ in range(depth):
        layers += [_conv(width, width), _active(width)]
    return nn.Sequential(*layers, _conv(width, outputs)), depth + 2


class _Added(nn.Module):
    """What some layers make of maps, and the maps themselves."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.layers(maps)


def edsr(inputs: int, outputs: int, width: int, depth: int) -> tuple[nn.Module, int]:
    """`depth` residual blocks without normalization (EDSR, Lim et al. 2017, arXiv:1707.02921), and their reach.

    With 64 channels and 16 blocks it is EDSR-baseline but for its end: one convolution and shuffle instead of two.
    """
    blocks = [_Added([_conv(width, width), nn.ReLU(), _conv(width, width)]) for _ in range(depth)]
    layers = [_conv(inputs, width), _Added([*blocks, _conv(width, width)]), _conv(width, outputs)]
    return nn.Sequential(*layers), 2 * depth + 3


def rlfn(inputs: int, outputs: int, width: int, depth: int) -> tuple[nn.Module, int]:
    """`depth` blocks of three convolutions within one sum, as RLFN (Kong et al. 2022, arXiv:2205.07514), and their reach.

    Without RLFN's spatial attention, which looks at the whole frame: tiles would show seams.
    """

    def block() -> nn.Module:
        three = [layer for _ in range(3) for layer in (_conv(width, width), nn.LeakyReLU(0.05))]
        return nn.Sequential(_Added(three), _conv(width, width, 1))

    blocks = [block() for _ in range(depth)]
    layers = [_conv(inputs, width), _Added([*blocks, _conv(width, width)]), _conv(width, outputs)]
    return nn.Sequential(*layers), 3 * depth + 3


NETWORKS = {"espcn": (espcn, 32, 1), "compact": (compact, 24, 3), "edsr": (edsr, 64, 16), "rlfn": (rlfn, 52, 6)}
"""Of each network: what builds it, and the width and depth that it has where nothing else is said."""


def upscaler(
    network: str, scale: int, frames: int, colour: str, width: int | None, depth: int | None, skip: str
) -> Upscaler:
    """An untrained network; `colour` is luma or rgb, width and depth those of the network's authors where None."""
    build, usual_width, usual_depth = NETWORKS[network]
    planes = 1 if colour == "luma" else 3
    body, reach = build(frames * planes, planes * scale**2, width or usual_width, depth or usual_depth)
    return Upscaler(body, scale, planes, skip, reach)
