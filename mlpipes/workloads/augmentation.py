"""Vectorised augmentation of image batches, drawn from torch's global generator, which the engine seeds per shard."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def crop_and_flip(images: Tensor, rows: Tensor, padding: int, flip: bool) -> Tensor:
    """Random translations by up to `padding` pixels with reflected borders, and horizontal flips.

    `images` uint8 (N, C, H, W) is the whole data set, `rows` int64 (B,) the samples wanted. One gather reads, shifts and
    flips; the result is uint8 (B, C, H, W) in channels_last memory order.
    """
    count, (height, width) = len(rows), images.shape[2:]
    offsets = (
        torch.randint(-padding, padding + 1, (2, count, 1)) if padding else torch.zeros(2, count, 1, dtype=torch.long)
    )
    down, across = torch.arange(height) + offsets[0], torch.arange(width) + offsets[1]
    if flip:
        across = torch.where(torch.rand(count, 1) < 0.5, across.flip(1), across)
    down, across = _reflected(down, height), _reflected(across, width)
    where = [index.to(images.device) for index in (rows[:, None, None], down[:, :, None], across[:, None, :])]
    return images[where[0], :, where[1], where[2]].permute(0, 3, 1, 2)


def shrunk(images: Tensor, factor: float) -> Tensor:
    """Images (B, C, H, W) of any type as float32, in sides of `factor` times as many pixels (rounded), antialiased."""
    size = [max(1, round(side * factor)) for side in images.shape[2:]]
    return F.interpolate(images.float(), size, mode="bilinear", align_corners=False, antialias=True)


def _reflected(index: Tensor, size: int) -> Tensor:
    return (size - 1) - ((size - 1) - index.abs()).abs()


def affine(images: Tensor, degrees: float, scale: float, shear: float, shift: float) -> Tensor:
    """Random rotation, scaling, shear and translation of float images (B, C, H, W), bilinear, zero outside.

    Each is uniform in ± its bound: degrees, fraction of the size, tangent, fraction of half the image.
    """
    draws = (torch.rand(4 + 1, len(images)) * 2 - 1).to(images.device)
    angle, size = draws[0] * math.radians(degrees), 1 + draws[1] * scale
    matrix = torch.stack(
        [
            torch.stack([size * angle.cos(), draws[2] * shear - size * angle.sin(), draws[3] * shift], dim=1),
            torch.stack([size * angle.sin(), size * angle.cos(), draws[4] * shift], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
