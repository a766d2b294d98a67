"""A torch program applied to the frames of a video, on one thread or on the GPU that its process was given."""

import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.export.passes import move_to_device_pass
from torch.utils import deterministic

from mlpipes.errors import ConfigError
from mlpipes.video.job import ModelPin
from mlpipes.workloads.tensors import compute_deterministically, compute_fp32_in_full, has_native_bf16
from mlpipes.workloads.tiles import TILE, in_tiles

GPU_TILE = (1088, 1920)
"""Height and width of a tile at most for a GPU, which needs many pixels at once; 64 channels of the four frames of a batch
take 2 GiB."""


class Program:
    """An exported program (pt2) as an upscaler, on one thread or on the GPU that its process was given."""

    def __init__(self, path: Path, pinned: ModelPin, tile: tuple[int, int] | None = None) -> None:
        torch.set_num_threads(1)  # other numbers of threads give other bits
        self.scale, self.frames, self.reach = pinned.scale, pinned.frames, pinned.reach
        self.name, self.bf16, self.device = pinned.name, pinned.precision == "bf16", pinned.device
        self.tile = tile or (TILE if self.device == "cpu" else GPU_TILE)
        program = torch.export.load(path)
        if self.device == "cuda":
            if not torch.cuda.is_available():
                raise ConfigError(
                    "this worker was given no GPU that torch can use; see `nvidia-smi`, or leave GPUs out"
                )
            _compute_repeatably()
            program = move_to_device_pass(program, self.device)
        self.program = program.module()
        self.caveat = ""
        """What a user should know of it on this machine."""
        if self.bf16 and not has_native_bf16(torch.device(self.device)):
            self.caveat = "bf16 is not in this processor, which takes many times as long by it as by fp32"

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """The frames, upscaled."""
        height, width = frames.shape[-3:-1]
        made = np.empty((len(frames), height * self.scale, width * self.scale, 3), np.uint8)
        at_once = 1 if self.device == "cpu" else len(frames)
        for first in range(0, len(frames), at_once):
            these = torch.from_numpy(frames[first : first + at_once])
            made[first : first + at_once] = in_tiles(self._run, these, self.scale, self.reach, self.tile).numpy()
        return made

    def _run(self, frames: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            try:
                return self.program(frames.to(self.device)).cpu()
            except torch.OutOfMemoryError as error:
                raise ConfigError(
                    f"the GPU has not enough memory for {self.name} ({str(error).partition('. ')[0]}); let fewer workers "
                    "share it with --workers or --gpus-per-worker"
                ) from error
            except RuntimeError as error:
                of_types = any(word in str(error).lower() for word in ("dtype", "type", "expected"))
                if not (self.bf16 and of_types):
                    raise
                said = str(error).splitlines()[0]
                raise ConfigError(f"{self.name} cannot compute in bf16 ({said}); use the precision fp32") from error


def _compute_repeatably() -> None:
    """The same bits every time on a GPU, and no rounding of pixels to TF32."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    compute_deterministically()
    cast(Any, deterministic).fill_uninitialized_memory = False  # as in training: a debugging aid that costs time
    torch.backends.cudnn.benchmark = False
    compute_fp32_in_full()
