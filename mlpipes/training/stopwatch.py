"""The stopwatch: seconds spent in steps, how busy CPU and GPU were meanwhile, and the memory that a worker needed."""

import resource
import sys
import time

import torch

_GPU_SECONDS = 1.0
"""How often a GPU is asked: NVML's own sample period is no longer than that."""


class Stopwatch:
    """Counts while steps run; `begin` after anything else, so that it does not count."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.wall, self.cpu = device, 0.0, 0.0
        """Seconds counted by this process; a resumed training's earlier ones are in its checkpoint."""
        self._asks_gpu, self._asked, self._percents = device.type == "cuda", time.perf_counter(), list[int]()
        self.begin()

    def begin(self) -> None:
        """Count from now on."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(self) -> float:
        """Seconds since the last call or `begin`; goes on counting."""
        wall, cpu = self._wall, self._cpu
        self.begin()
        self.wall += self._wall - wall
        self.cpu += self._cpu - cpu
        if self._asks_gpu and self._wall - self._asked > _GPU_SECONDS:
            self._asked = self._wall
            try:
                self._percents.append(torch.cuda.utilization(self.device))
            except Exception:  # no NVML, or a slice of a GPU: then it is not known, and no reason to end a training
                self._asks_gpu = False
        return self._wall - wall

    def usage(self) -> torch.Tensor:
        """What this process used; float64 (4,).

        CPU seconds per second of steps, peak resident memory, peak GPU memory (bytes), and the mean share of time in which
        the GPU was busy (0 to 1; NaN where nobody knows), which is NVML's figure and counts any kernel, however small.
        """
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        on_gpu = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        busy = sum(self._percents) / len(self._percents) / 100 if self._percents else float("nan")
        values = [self.cpu / self.wall if self.wall else 0.0, resident, on_gpu, busy]
        return torch.tensor(values, dtype=torch.float64, device=self.device)
