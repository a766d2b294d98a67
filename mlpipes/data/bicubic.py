"""Bicubic resizing as MATLAB's `imresize` does it, which is how the literature makes low-resolution images."""

from functools import lru_cache

import numpy as np

_LEFT, _RIGHT = 2.0, 2.0
"""How far Keys' kernel reaches, in pixels of the coarser side."""


def cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -1/2 (Keys 1981, doi:10.1109/TASSP.1981.1163711), any shape."""
    x = np.abs(distance)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= _LEFT, far, 0.0))


@lru_cache(maxsize=256)
def resizing(source: int, target: int) -> np.ndarray:
    """The matrix (target, source) float64 that resizes a line of pixels; antialiased where it shrinks.

    Pixels beyond an end are the line mirrored, the pixel at the end twice. Rows sum to 1.
    """
    ratio = target / source
    stretch = min(ratio, 1.0)  # a kernel that is wider by as much as the line shrinks lets no alias through
    centres = (np.arange(target) + 0.5) / ratio - 0.5
    first = np.floor(centres - _LEFT / stretch).astype(np.int64)
    taps = int(np.ceil((_LEFT + _RIGHT) / stretch)) + 2
    places = first[:, None] + np.arange(taps)
    weights = stretch * cubic(stretch * (centres[:, None] - places))
    weights /= weights.sum(axis=1, keepdims=True)
    around = places % (2 * source)
    mirrored = np.where(around < source, around, 2 * source - 1 - around)
    matrix = np.zeros((target, source))
    np.add.at(matrix, (np.arange(target)[:, None], mirrored), weights)
    return matrix


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """An image uint8 (H, W, C) at another size, rounded and clipped to uint8."""
    pixels = np.einsum("ah,hwc->awc", resizing(image.shape[0], height), image.astype(np.float64), optimize=True)
    pixels = np.einsum("bw,awc->abc", resizing(image.shape[1], width), pixels, optimize=True)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
