"""The stopwatch: wall-clock and CPU seconds spent in steps, and the memory that a worker needed."""

import resource
import sys
import time

import torch


class Stopwatch:
    """Counts while steps run; `begin` after anything else, so that it does not count."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        """Seconds counted by this process; a resumed training's earlier ones are in its checkpoint."""
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
        return self._wall - wall


def usage(stopwatch: Stopwatch, device: torch.device) -> torch.Tensor:
    """CPU seconds per second of steps, peak resident memory, peak GPU memory (bytes) of this process; float64 (3,)."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    on_gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    values = [stopwatch.cpu / stopwatch.wall if stopwatch.wall else 0.0, resident, on_gpu]
    return torch.tensor(values, dtype=torch.float64, device=device)
