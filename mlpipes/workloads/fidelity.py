"""How close pictures are to the truth: PSNR and SSIM as super-resolution's literature takes them, and flicker."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mlpipes.workloads.upscalers import LUMA

CAP = 100.0
"""PSNR of pictures that are equal, in dB."""
_TAPS, _SIGMA = 11, 1.5


def luma(pictures: Tensor) -> Tensor:
    """BT.601's luma in limited range, float64 (..., H, W), of full-range colours (..., 3, H, W) in levels 0 to 255."""
    weights = torch.tensor(LUMA, dtype=torch.float64, device=pictures.device)
    return torch.einsum("...chw,c->...hw", pictures.double(), weights) + 16


def shaved(pictures: Tensor, border: int) -> Tensor:
    """Pictures (..., H, W) without so many pixels at each edge."""
    return pictures[..., border : pictures.shape[-2] - border, border : pictures.shape[-1] - border]


def psnr(pictures: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio of levels 0 to 255 in dB, over everything that is handed in; at most `CAP`."""
    error = float(((pictures.double() - truth.double()) ** 2).mean())
    return CAP if error == 0 else min(CAP, 10 * math.log10(255**2 / error))


def ssim(pictures: Tensor, truth: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) of planes (..., H, W) in levels 0 to 255, the mean over them.

    Gaussian windows of 11×11 with σ 1.5, only where they lie inside: scikit-image's `structural_similarity` with
    `gaussian_weights=True, sigma=1.5, use_sample_covariance=False`. Raises ValueError for planes that are smaller.
    """
    if min(truth.shape[-2:]) < _TAPS:
        raise ValueError(f"SSIM needs {_TAPS}×{_TAPS} pixels; these planes have {truth.shape[-2]}×{truth.shape[-1]}")
    x, y = pictures.double(), truth.double()
    x_mean, y_mean, xx, yy, xy = _blurred(_blurred(torch.stack([x, y, x * x, y * y, x * y])).mT).mT
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    covariance = xy - x_mean * y_mean
    variances = xx - x_mean**2 + yy - y_mean**2
    found = ((2 * x_mean * y_mean + c1) * (2 * covariance + c2)) / ((x_mean**2 + y_mean**2 + c1) * (variances + c2))
    return float(found.mean())


def _blurred(maps: Tensor) -> Tensor:
    """Maps (..., H, W) behind a Gaussian window along their height, where it lies inside."""
    weights = [math.exp(-0.5 * ((tap - _TAPS // 2) / _SIGMA) ** 2) for tap in range(_TAPS)]
    length, found = maps.shape[-2] - _TAPS + 1, None
    for tap, weight in enumerate(
        weights
    ):  # sums of slices: quicker than a convolution, which float64 has no kernel for
        part = maps.narrow(-2, tap, length) * (weight / sum(weights))
        found = part if found is None else found.add_(part)
    assert found is not None  # noqa: S101 - there are taps
    return found


def warping_error(first: Tensor, second: Tensor, flow: Tensor, border: int) -> float:
    """How much a frame differs from the one before, carried along the motion: root mean square of levels.

    Frames (H, W); `flow` (2, H, W) says for each pixel of the second how far right and down of it the first has the same.
    Pixels whose motion comes from outside the first, or from within `border` of an edge, do not count. It is 0 for what
    moves without any change, and for what is blank: compare it only beside the truth's own.
    """
    height, width = second.shape
    down, right = torch.meshgrid(
        torch.arange(height, dtype=torch.float64, device=flow.device),
        torch.arange(width, dtype=torch.float64, device=flow.device),
        indexing="ij",
    )
    x, y = right + flow[0].double(), down + flow[1].double()
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)[None]
    carried = F.grid_sample(first.double()[None, None], grid, mode="bicubic", align_corners=True)[0, 0]
    inside = (x >= border) & (x <= width - 1 - border) & (y >= border) & (y <= height - 1 - border)
    change = shaved((carried - second.double()) ** 2, border)[shaved(inside, border)]
    return math.sqrt(float(change.mean())) if len(change) else 0.0
