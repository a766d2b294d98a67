"""Full disks: a training that finds no room waits for some instead of losing what it has."""

import errno
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_delay,
    stop_when_event_set,
    wait_fixed,
)

from mlpipes.errors import DiskFullError
from mlpipes.store.messages import Notify, Warned

T = TypeVar("T")

RETRY_SECONDS = 5.0
PATIENCE_SECONDS = 600.0
"""Well below the 30 minutes after which the other workers, who wait for this one, give up."""
_FULL = {errno.ENOSPC, errno.EDQUOT}


def write_with_patience(
    write: Callable[[], T],
    folder: Path,
    needed_bytes: int,
    notify: Notify,
    patience_seconds: float = PATIENCE_SECONDS,
    *,
    ending: threading.Event | None = None,
) -> T:
    """Call `write` until it does not fail for want of room; returns what it returns. `ending` set ends the patience.

    `write` must leave nothing behind when it fails, as all writers of `mlpipes.store.files` do. Raises DiskFullError when
    patience is out, and any other error at once.
    """

    def warn(state: RetryCallState) -> None:
        if state.attempt_number == 1:
            text = f"the disk of {folder} is full; training waits for room ({needed_bytes:,} bytes)"
            notify(Warned(text=text))

    def attempt() -> T:
        try:
            return write()
        except Exception as error:
            if not is_disk_full(error, folder, needed_bytes):
                raise
            raise DiskFullError(
                f"the disk of {folder} is full, and had no room for {needed_bytes:,} bytes within {patience_seconds:.0f} s. "
                "The last good checkpoint is kept. Make room, and materialize again to resume from it."
            ) from error

    ending = ending or threading.Event()
    retrying = Retrying(
        retry=retry_if_exception_type(DiskFullError),
        wait=wait_fixed(RETRY_SECONDS),
        sleep=sleep_using_event(ending),
        stop=stop_after_delay(patience_seconds) | stop_when_event_set(ending),
        before_sleep=warn,
        reraise=True,
    )
    return retrying(attempt)


def is_disk_full(error: BaseException, folder: Path, needed_bytes: int) -> bool:
    """Whether an error while writing comes from a full disk.

    safetensors and torch.save report one as errors of their own without a number, so free space counts as well.
    """
    chain: Any = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in _FULL:
            return True
        chain = chain.__cause__ or chain.__context__
    if isinstance(error, OSError):
        return False
    try:
        return "os error 28" in str(error) or shutil.disk_usage(folder).free < needed_bytes
    except OSError:
        return False
