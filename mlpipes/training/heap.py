"""The process's heap: memory that a training step frees is kept for the next one, and not given back to the system."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_KEPT, _LARGEST = 64 << 20, 32 << 20
_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Keep 64 MiB of what is freed at the heap's end, and blocks of up to 32 MiB in the heap; whether that was set.

    It is what glibc comes to by itself, as its most, once a block of 32 MiB was freed. Until then it gives back more, and
    each page costs a fault and 4 KiB of zeros at its next use: some thousands a step where texts differ in length
    (docs/measured.md). That holds for the main thread; in others it does little. Left alone where the user has chosen
    otherwise by an environment variable (man 3 mallopt), and where there is no glibc.
    """
    if any(os.environ.get(name) for name in _CHOSEN) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    return all(mallopt(*option) == 1 for option in ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _KEPT)))
