"""Super-resolution of frames: the task family, and its workload `video_sr`."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mlpipes.data.dataset import Columns, Source
from mlpipes.data.photographs import Photographs, names_of
from mlpipes.data.splits import SplitPlan
from mlpipes.errors import ConfigError
from mlpipes.reporting.metric import Metric
from mlpipes.reporting.report import Report
from mlpipes.reporting.super_resolution import CROP, LOOKED_AT, super_resolution_report
from mlpipes.workloads import degradation, fidelity
from mlpipes.workloads.base import Batch, DataInfo, Hyperparameters, Look, Workload, predicted
from mlpipes.workloads.deployables import TorchProgram
from mlpipes.workloads.optimization import adamw, trapezoid
from mlpipes.workloads.tiles import in_tiles
from mlpipes.workloads.upscalers import Upscaler, upscaler

_PIXELS_AT_ONCE = 1 << 25
_EPSILON = 1e-3
_LEAST = 8


class SuperResolutionHyperparameters(Hyperparameters):
    """What can be set about training an upscaler."""

    upscale: Literal[2, 3, 4] = Field(default=2, description="how many times as high and as wide frames become")
    frames: Literal[1, 3, 5] = Field(default=1, description="frames that are seen, the one to upscale in their middle")
    network: Literal["compact", "espcn", "edsr", "rlfn"] = "compact"
    width: int | None = Field(default=None, ge=1, description="channels; null: 24 (compact), 32, 64 (edsr), 52 (rlfn)")
    depth: int | None = Field(default=None, ge=1, description="blocks; null: 3 (compact), 1, 16 (edsr), 6 (rlfn)")
    colour: Literal["luma", "rgb"] = Field(
        default="luma", description="luma: brightness is learned, and colour interpolated; rgb: all three are learned"
    )
    skip: Literal["bicubic", "nearest"] = Field(default="bicubic", description="what the network adds details to")
    patch: int = Field(default=32, ge=_LEAST, description="side of what a step sees, in low-resolution pixels, at most")
    logical_shards: int | None = Field(
        default=2, ge=1, description="parts of a global batch, the most workers that can share it; small ones are slow"
    )
    loss: Literal["charbonnier", "l1", "l2"] = "charbonnier"
    learning_rate: float = Field(default=4e-3, gt=0, description="2e-4 is right for edsr and rlfn")
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")


class SuperResolution(Workload):
    """Upscales frames: columns `image` uint8 (N, 3, H, W), of which `size` (N, 2) is real, and `photograph` (N,), whose name
    is in the facts' `photographs`.

    Low-resolution frames are made of them as they are read, so that a scale needs no data of its own. With several frames,
    a synthetic camera moves over the photograph.
    """

    metric = Metric("psnr_y_gain")
    """PSNR on luma above the better of bicubic and the untrained network, paired: its baseline is 0 for whatever image."""

    hyperparameters = SuperResolutionHyperparameters
    served_rows = 1
    """A picture has a size of its own."""

    def __init__(self, source: Source, split: SplitPlan) -> None:
        self.source, self.split = source, split

    def build_model(self, hp: SuperResolutionHyperparameters, info: DataInfo) -> nn.Module:
        """The network that the hyperparameters name, in the memory order that convolutions like best."""
        model = upscaler(hp.network, hp.upscale, hp.frames, hp.colour, hp.width, hp.depth, hp.skip)
        return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def optimizers(self, model: nn.Module, hp: SuperResolutionHyperparameters) -> Sequence[torch.optim.Optimizer]:
        """AdamW without decay, which is Adam."""
        return [adamw(model, hp.learning_rate, 0.0)]

    def learning_rate_factor(self, progress: float, hp: SuperResolutionHyperparameters) -> float:
        """Linear warm-up, then linear decay to zero, which averages weights as well as a moving average of them would."""
        return trapezoid(progress, hp.warmup)

    def micro_batches(self, columns: Mapping[str, Any], rows: Tensor, hp: Any) -> Sequence[Tensor]:
        """Few rows together where photographs are large."""
        most = max(1, _PIXELS_AT_ONCE // columns["image"][:1].numel())
        return rows.split(min(most, hp.micro_batch or most)) if len(rows) else [rows]

    def batch(
        self, columns: Mapping[str, Any], rows: Tensor, hp: SuperResolutionHyperparameters, *, augment: bool
    ) -> Batch:
        """To train on, `low` (B, T, C, h, w) and `high` (B, C, sh, sw); else `image`, `size`, `photograph` as they are."""
        images = columns["image"]
        if not augment:
            return {name: columns[name][rows.to(images.device)] for name in ("image", "size", "photograph")}
        cut = degradation.margin(hp.upscale, hp.frames)
        patch = min(hp.patch, min(images.shape[2:]) // hp.upscale - 2 * cut)
        if patch < _LEAST:
            raise ConfigError(
                f"pictures of {images.shape[3]}×{images.shape[2]} pixels are too small to learn ×{hp.upscale} of "
                f"{hp.frames} frames from: they must be {(_LEAST + 2 * cut) * hp.upscale} pixels a side"
            )
        high = degradation.crops(images, rows, (patch + 2 * cut) * hp.upscale)
        motion = degradation.random_motion(len(rows)) if hp.frames > 1 else torch.zeros(len(rows), 3)
        low = degradation.downscaled(degradation.clip_of(high, motion, hp.frames), hp.upscale)
        low, high = fidelity.shaved(low, cut), fidelity.shaved(high, cut * hp.upscale)
        if hp.colour == "luma":
            low, high = (fidelity.luma(each).float().unsqueeze(-3) for each in (low, high))
        return {"low": low, "high": high.float()}

    def loss(self, model: nn.Module, batch: Batch, hp: SuperResolutionHyperparameters) -> Tensor:
        """The mean of each sample's pixels, summed over the samples."""
        return _losses(model(batch["low"]), batch["high"], hp.loss).sum()

    def predict(self, model: nn.Module, batch: Batch, hp: SuperResolutionHyperparameters) -> dict[str, Tensor]:
        """Figures of each photograph, on whole levels, the border shaved by the scale."""
        found = [self._figures(model, *each, hp) for each in _photographs(batch, hp.upscale)]
        return {name: torch.tensor([each[name] for each in found]) for name in found[0]}

    def _figures(self, model: Any, truth: Tensor, number: int, hp: SuperResolutionHyperparameters) -> dict[str, float]:
        low = _low(truth, number, hp, 0)
        made, middle = _made(model, low), low[:, hp.frames // 2]
        pictures = {
            "": made,
            "bicubic_": degradation.enlarged(middle, hp.upscale),
            "untrained_": model.interpolated(low),
        }
        wanted = fidelity.shaved(truth, hp.upscale)
        figures = {"loss": float(_losses(made, truth[None].float(), hp.loss)), "scale": hp.upscale, "frames": hp.frames}
        for name, picture in pictures.items():
            seen = fidelity.shaved(_levels(picture)[0], hp.upscale)
            planes = fidelity.luma(seen), fidelity.luma(wanted)
            figures[f"{name}psnr_y"], figures[f"{name}psnr_rgb"] = fidelity.psnr(*planes), fidelity.psnr(seen, wanted)
            if name != "untrained_":  # it costs more than the network
                figures[f"{name}ssim_y"] = fidelity.ssim(*planes)
        return figures

    def outputs(self, model: nn.Module, batch: Batch, hp: SuperResolutionHyperparameters) -> dict[str, Tensor]:
        """Of made, bicubic and truth: `crops` (B, 3, 3, CROP, CROP) where bicubic errs most, SSIM of colours `ssim_rgb`
        and warping error from one frame to the next `flicker`, (B, 3); `speed` (B, 2): seconds and pixels of a frame.
        """
        seen = [self._seen(model, *each, hp) for each in _photographs(batch, hp.upscale)]
        return {name: torch.stack([each[name] for each in seen]) for name in seen[0]}

    def _seen(self, model: Any, truth: Tensor, number: int, hp: SuperResolutionHyperparameters) -> dict[str, Tensor]:
        motion, pairs, seconds = degradation.settled_motion(number), [], 0.0
        for later in (0, 1):
            low, began = _low(truth, number, hp, later), time.perf_counter()
            made = _levels(_made(model, low)).cpu()
            seconds = time.perf_counter() - began
            bicubic = degradation.enlarged(low[:, hp.frames // 2], hp.upscale).cpu()
            pairs.append(torch.cat([made, bicubic, degradation.moved(truth[None], motion[None], later).cpu()]))
        flow = degradation.flow_of(motion, truth.shape[1], truth.shape[2], 1)
        frames = zip(*map(fidelity.luma, pairs), strict=True)
        flicker = [fidelity.warping_error(before, after, flow, 8) for before, after in frames]
        inner = fidelity.shaved(pairs[0], hp.upscale)
        return {
            "crops": _worst(pairs[0]),
            "ssim_rgb": torch.tensor([fidelity.ssim(each, inner[2]) for each in inner]),
            "flicker": torch.tensor(flicker),
            "speed": torch.tensor([seconds, float(truth[0].numel())]),
        }

    def validate(self, predictions: Mapping[str, np.ndarray], columns: Columns) -> dict[str, float]:
        """The gain, PSNR and SSIM on luma, and the loss, each a mean over photographs or patches."""
        names = ("psnr_y", "ssim_y", "loss")
        gain = _gain(predictions).mean()
        return {"psnr_y_gain": float(gain)} | {name: float(predictions[name].mean()) for name in names}

    def report(self, predictions: Mapping[str, np.ndarray], columns: Columns, info: DataInfo, look: Look) -> Report:
        """Each photograph beside the baselines, crops before and after, flicker and speed."""
        numbers = np.asarray(columns["photograph"])
        _, rows = np.unique(numbers, return_index=True)
        seen = rows[:LOOKED_AT]
        names = names_of(numbers.tolist(), info.facts)
        return super_resolution_report(predictions, _gain(predictions), names, seen, look(seen))

    def scores(self, predictions: Mapping[str, np.ndarray], columns: Columns) -> np.ndarray:
        """PSNR on luma."""
        return predictions["psnr_y"]

    def deployable(
        self, model: nn.Module, hp: SuperResolutionHyperparameters, info: DataInfo, columns: Columns
    ) -> TorchProgram:
        """Frames uint8 (N, H, W, 3) of any size, or clips (N, T, H, W, 3), to frames uint8 (N, sH, sW, 3)."""
        assert isinstance(model, Upscaler)  # noqa: S101 - built above
        frames = torch.from_numpy(np.array(columns["image"][:2, :, :24, :32])).permute(0, 2, 3, 1)
        clips = frames[:, None].expand(-1, hp.frames, -1, -1, -1) if hp.frames > 1 else frames
        about = {"scale": hp.upscale, "frames": hp.frames, "reach": model.reach, "network": hp.network}
        free = (0, 2, 3) if hp.frames > 1 else (0, 1, 2)
        example, order, unrounded = clips.contiguous().numpy(), torch.channels_last, _Unrounded(model)
        return TorchProgram(
            _Serving(unrounded), example, free, {"super_resolution": about}, memory_format=order, unrounded=unrounded
        )


class _Unrounded(nn.Module):
    """Frames (N, H, W, 3) or clips (N, T, H, W, 3) of levels to frames (N, sH, sW, 3) float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor) -> Tensor:
        clips = frames if frames.ndim == 5 else frames[:, None]
        return self.model(clips.permute(0, 1, 4, 2, 3)).permute(0, 2, 3, 1)


class _Serving(nn.Module):
    def __init__(self, unrounded: _Unrounded) -> None:
        super().__init__()
        self.unrounded = unrounded

    def forward(self, frames: Tensor) -> Tensor:
        return _levels(self.unrounded(frames)).to(torch.uint8).contiguous()


def _made(model: Any, low: Tensor) -> Tensor:
    """What a network makes of clips (B, T, 3, h, w), as it does where it is served: pictures (B, 3, sh, sw)."""
    made = in_tiles(_Unrounded(model), low.permute(0, 1, 3, 4, 2), model.skip.scale, model.reach)
    return made.permute(0, 3, 1, 2)


def _levels(pictures: Tensor) -> Tensor:
    return pictures.round().clamp(0, 255)


def _losses(made: Tensor, high: Tensor, kind: str) -> Tensor:
    """Of each sample (B,)."""
    difference = (made - high) / 255
    if kind == "charbonnier":
        return ((difference**2 + _EPSILON**2).sqrt() - _EPSILON).mean((1, 2, 3))
    return (difference.abs() if kind == "l1" else difference**2).mean((1, 2, 3))


def _photographs(batch: Batch, scale: int) -> Sequence[tuple[Tensor, int]]:
    """Photographs (3, H, W) as far as they are real and the scale divides them, and their numbers."""
    return [
        (image[:, : height // scale * scale, : width // scale * scale], number)
        for image, (height, width), number in zip(
            batch["image"], batch["size"].tolist(), batch["photograph"].tolist(), strict=True
        )
    ]


def _low(truth: Tensor, number: int, hp: SuperResolutionHyperparameters, later: int) -> Tensor:
    """The low-resolution frames (1, T, 3, h, w) around a photograph (3, H, W), or around it so many frames later."""
    motion, middle = degradation.settled_motion(number)[None], hp.frames // 2
    times = range(later - middle, later - middle + hp.frames)
    clip = torch.stack([degradation.moved(truth[None], motion, time) for time in times], dim=1)
    return degradation.downscaled(clip, hp.upscale)


def _worst(pictures: Tensor) -> Tensor:
    """Of made, bicubic and truth (3, 3, H, W), the square where bicubic errs most (3, 3, CROP, CROP), black beyond edges."""
    height, width = pictures.shape[2:]
    pictures = F.pad(pictures, (0, max(0, CROP - width), 0, max(0, CROP - height)))
    errors = F.avg_pool2d(((pictures[1] - pictures[2]) ** 2).mean(0)[None, None], CROP, stride=8)[0, 0]
    top, left = (8 * int(place) for place in divmod(int(errors.argmax()), errors.shape[1]))
    return pictures[:, :, top : top + CROP, left : left + CROP]


def _gain(predictions: Mapping[str, np.ndarray]) -> np.ndarray:
    best = np.maximum(predicted(predictions, "bicubic_psnr_y"), predicted(predictions, "untrained_psnr_y"))
    return predicted(predictions, "psnr_y") - best


video_sr = SuperResolution(Photographs(), SplitPlan(0.07, group_by="region", content=("image",)))
