"""Columns as tensors on a device; ragged ones stay flat, and are padded batch by batch."""

import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlpipes.data.dataset import Columns
from mlpipes.data.ragged import Ragged
from mlpipes.errors import TrainingFailedError


@dataclass(frozen=True)
class RaggedTensor:
    """A ragged column on a device."""

    values: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """The length of each row, int64 (N,)."""
        return np.diff(self.offsets.cpu().numpy())

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.values.device

    def padded(self, rows: Tensor, least: int = 1) -> tuple[Tensor, Tensor]:
        """The given rows (B,) as int64 (B, L), padded with 0 to the longest of them, and which entries are real (bool).

        `least`: what L is at least.
        """
        rows = rows.to(self.offsets.device)
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        along = torch.arange(max([least, *lengths.tolist()]), device=starts.device)  # also of no rows
        real = along < lengths[:, None]
        picked = self.values[torch.where(real, starts[:, None] + along, 0)] if len(self.values) else real.long()
        return picked.long().masked_fill(~real, 0), real


TensorColumns = Mapping[str, Any]
"""Tensors (N, …) or `RaggedTensor`, by name."""


def on_device(columns: Columns, device: torch.device) -> dict[str, Any]:
    """Whole columns on the device. On the CPU they stay memory-mapped, so workers of a node share one copy."""

    def moved(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    with warnings.catch_warnings():
        # torch cannot mark a tensor as read-only and warns of it; nothing in here writes to the data.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return {
            name: RaggedTensor(moved(column.values), moved(column.offsets))
            if isinstance(column, Ragged)
            else moved(column)
            for name, column in columns.items()
        }


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which forward passes run at `bf16` or `fp32`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def each_row(method: str, outputs: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Outputs in float32. Raises TrainingFailedError for one that is not of so many rows."""
    for name, value in outputs.items():
        if value.ndim == 0 or len(value) != rows:
            raise TrainingFailedError(
                f"`{method}` gives {name!r} of shape {tuple(value.shape)} for {rows} samples; its first dimension must be "
                "that of the samples"
            )
    return {name: value.float() for name, value in outputs.items()}


def compute_deterministically(wanted: bool = True) -> None:
    """What `torch.use_deterministic_algorithms` does, without importing Inductor: 2 s of a processor, in each process.

    Whoever compiles imports it later, and it is then told by its own switch.
    """
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = str(int(wanted))
    if "torch._inductor" in sys.modules:
        torch.use_deterministic_algorithms(wanted)
    else:
        torch.set_deterministic_debug_mode("error" if wanted else "default")


def compute_fp32_in_full() -> None:
    """Keep NVIDIA GPUs from rounding what convolutions in float32 multiply to TF32's 10 bits, as they do by default.

    Who wants that speed has bf16; and pixels of 8 bits, interpolated in TF32, are off by a quarter of a level.
    """
    # Not through `fp32_precision`, per kind of operation: torch's own `cudnn.flags`, of which exporting makes use, reads the
    # flag for all of them and refuses a mixture.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; without that, bf16 is slower than float32.

    A CPU that is told to do as an older one (`ATEN_CPU_CAPABILITY`) has what the older one has.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
