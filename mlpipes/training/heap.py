"""The process's heap: memory that a training step frees is kept for the next one, and not given back to the system."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_KEPT, _LARGEST = 1 << 30, 32 << 20
_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Keep up to 1 GiB of what is freed, in blocks of up to 32 MiB (the most glibc allows); whether that was set.

    A step allocates what the step before it freed. By default glibc gives back all but twice the largest block, and each
    page then costs a fault and 4 KiB of zeros at its next use: thousands a step where texts differ in length, which is 2
    to 3 % of a processor's time. Left alone where the user has chosen otherwise by an environment variable
    (man 3 mallopt), and where there is no glibc. Values are not touched, so results have the same bits.
    """
    if any(os.environ.get(name) for name in _CHOSEN) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    return all(mallopt(*option) == 1 for option in ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _KEPT)))
