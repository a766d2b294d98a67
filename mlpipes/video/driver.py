"""The driver of a video: what the Ray job runs. Cuts the source, has chunks upscaled and segments encoded, joins them.

Run as `python -m mlpipes.video.driver <specification>`. It exits with 0 only if what it was to make is in the store.
"""

import logging
import os
import sys
import threading
from pathlib import Path

from mlpipes.compute.warm_driver import run_driver
from mlpipes.errors import CorruptionError, UserError
from mlpipes.store.heartbeat import HEARTBEAT_SECONDS
from mlpipes.store.lease import Lease
from mlpipes.store.messages import Failed, MessageWriter, Notify, Warned
from mlpipes.video.chunks import cut
from mlpipes.video.job import VideoJob
from mlpipes.video.joining import final_of, join
from mlpipes.video.preview import make_preview

_MENDS = 3
"""How often parts that were found corrupt are made again within one attempt."""


def main(path: Path) -> int:
    """Drive one attempt to its end; returns the exit code."""
    job = VideoJob.read(path)
    notify = MessageWriter(job.folder.messages(job.attempt))
    lease = Lease.take(job.folder.path, f"video job a{job.attempt}")
    stop = threading.Event()
    threading.Thread(target=_watch, args=(job, lease, notify, stop), daemon=True, name="watch").start()
    try:
        for _ in range(_MENDS):
            try:
                _make(job, path, notify)
            except CorruptionError as error:
                notify(Warned(text=str(error)))
                continue
            return 0
        notify(Failed(error=f"parts were corrupt {_MENDS} times in a row; is the disk sound?", fatal=True))
    except UserError as error:
        notify(Failed(error=str(error), fatal=True))
    except Exception as error:
        notify(Failed(error=f"{type(error).__name__}: {error}", fatal=False))
        raise
    finally:
        stop.set()
    return 1


def _watch(job: VideoJob, lease: Lease, notify: Notify, stop: threading.Event) -> None:
    """Show that this driver lives, and end it when another one has taken over; Ray ends its workers with it."""
    heartbeat = job.folder.heartbeat(job.attempt)
    while not stop.wait(HEARTBEAT_SECONDS):
        heartbeat.touch()
        if lease.is_lost():
            notify(Warned(text="another job has taken over this video; this one ends"))
            os._exit(1)


def _make(job: VideoJob, path: Path, notify: Notify) -> None:
    import ray

    from mlpipes.video.pool import Pool, Todo

    if job.until == "final" and final_of(job) is not None:
        return
    plan = cut(job)
    if plan.mended:
        notify(Warned(text=f"{plan.mended} frames had no time, or none later than the frame before; theirs was mended"))
    if not Todo.of(job, plan).empty:
        ray.init(ignore_reinit_error=True, logging_level=logging.WARNING)
        Pool(job, path, plan, lambda text: notify(Warned(text=text))).run()
    make_preview(job, plan)
    if job.until == "final":
        join(job, plan)


if __name__ == "__main__":
    run_driver(lambda: main(Path(sys.argv[1])))
