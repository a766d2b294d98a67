"""What training makes of photographs: crops that are turned and mirrored, synthetic camera motion, low-resolution frames."""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from mlpipes.data.bicubic import resizing

FASTEST, ZOOM = 3.0, 0.01
"""Of synthetic motion, from one frame to the next: pixels at high resolution, and share of the size."""
_REACH = 2
"""Low-resolution pixels that the downscaling kernel reaches, on each side."""


@lru_cache(maxsize=256)
def _matrix(source: int, target: int, device: torch.device) -> Tensor:
    return torch.from_numpy(resizing(source, target)).float().to(device)


def downscaled(pictures: Tensor, scale: int) -> Tensor:
    """Pictures (..., H, W), levels 0 to 255, at 1/scale of their size: antialiased bicubic, whole levels.

    H and W must be multiples of the scale; the result is float32.
    """
    height, width = pictures.shape[-2:]
    with torch.autocast(pictures.device.type, enabled=False):
        rows = _matrix(height, height // scale, pictures.device)
        columns = _matrix(width, width // scale, pictures.device)
        return (rows @ pictures.float() @ columns.T).round().clamp(0, 255)


def enlarged(pictures: Tensor, scale: int) -> Tensor:
    """Pictures (..., H, W) at `scale` times their size by bicubic, as MATLAB's `imresize`; whole levels, float32."""
    height, width = pictures.shape[-2:]
    with torch.autocast(pictures.device.type, enabled=False):
        rows = _matrix(height, height * scale, pictures.device)
        columns = _matrix(width, width * scale, pictures.device)
        return (rows @ pictures.float() @ columns.T).round().clamp(0, 255)


def margin(scale: int, frames: int) -> int:
    """Low-resolution pixels around a crop to cut off once it has moved and is downscaled: they miss what lay beyond it."""
    return _REACH + math.ceil(FASTEST * (frames // 2) / scale)


def crops(images: Tensor, rows: Tensor, side: int) -> Tensor:
    """Squares (B, 3, side, side) of rows (B,) of `images` uint8 (N, 3, H, W): cut, turned and mirrored at random."""
    count, (height, width) = len(rows), images.shape[2:]
    along = torch.arange(side)
    places = []
    for length in (height, width):
        place = torch.randint(0, length - side + 1, (count, 1)) + along
        places.append(torch.where(torch.rand(count, 1) < 0.5, place.flip(1), place))
    where = [index.to(images.device) for index in (rows[:, None, None], places[0][:, :, None], places[1][:, None, :])]
    picked = images[where[0], :, where[1], where[2]].permute(0, 3, 1, 2)
    turned = (torch.rand(count, 1, 1, 1) < 0.5).to(images.device)
    return torch.where(turned, picked.transpose(2, 3), picked)


def random_motion(count: int) -> Tensor:
    """Motions (count, 3): pixels right and down, and share of zoom, from one frame to the next; zoom in half of them."""
    angle, speed, zoom = torch.rand(count) * 2 * math.pi, torch.rand(count) * FASTEST, torch.rand(count) * 2 - 1
    zoom = torch.where(torch.rand(count) < 0.5, zoom * ZOOM, 0.0)
    return torch.stack([speed * angle.cos(), speed * angle.sin(), zoom], dim=1)


def settled_motion(number: int) -> Tensor:
    """A motion (3,) for evaluation, which follows from a photograph's number alone and differs from number to number."""
    part = (number * 0.6180339887498949) % 1.0
    angle = 2 * math.pi * part
    speed = FASTEST * (0.25 + 0.75 * ((number * 0.7548776662466927) % 1.0))
    return torch.tensor([speed * math.cos(angle), speed * math.sin(angle), ZOOM * (part - 0.5) * (number % 2)])


def moved(pictures: Tensor, motion: Tensor, time: int) -> Tensor:
    """Pictures (B, 3, H, W) as a camera sees them `time` frames later, by motions (B, 3), zooming about the centre.

    Bicubic between pixels, edges repeated; rounded to whole levels; float32.
    """
    if time == 0:
        return pictures.float()
    grid = _places(pictures.shape[-2], pictures.shape[-1], motion.to(pictures.device), time)
    size = torch.tensor([pictures.shape[-1], pictures.shape[-2]], device=pictures.device)
    seen = F.grid_sample(
        pictures.float(), 2 * grid / (size - 1) - 1, mode="bicubic", padding_mode="border", align_corners=True
    )
    return seen.round().clamp(0, 255)


def flow_of(motion: Tensor, height: int, width: int, time: int) -> Tensor:
    """Where the still picture has what `moved` shows at a time: offsets right and down (2, H, W), float64."""
    grid = _places(height, width, motion[None].double(), time)[0]
    here = _places(height, width, torch.zeros(1, 3, dtype=torch.float64), 0)[0]
    return (grid - here).permute(2, 0, 1)


def _places(height: int, width: int, motion: Tensor, time: int) -> Tensor:
    """Where each pixel of a moved picture looks in the still one: (B, H, W, 2), right and down, in pixels."""
    right, down = (torch.arange(side, dtype=motion.dtype, device=motion.device) for side in (width, height))
    down, right = torch.meshgrid(down, right, indexing="ij")
    still = torch.stack([right, down], dim=-1)
    centre = torch.tensor([(width - 1) / 2, (height - 1) / 2], dtype=motion.dtype, device=motion.device)
    size = 1 + time * motion[:, None, None, 2:]
    return (still - centre) * size + centre + time * motion[:, None, None, :2]


def clip_of(pictures: Tensor, motion: Tensor, frames: int) -> Tensor:
    """Pictures (B, 3, H, W), and how they look before and after by motions (B, 3): (B, frames, 3, H, W)."""
    middle = frames // 2
    return torch.stack([moved(pictures, motion, time - middle) for time in range(frames)], dim=1)
