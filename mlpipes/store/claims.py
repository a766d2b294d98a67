"""Claims: which attempt a run of a job's entry point is, where whoever runs it may run it again and does not count.

KubeRay's operator starts the entry point anew when it has lost the head, or when a queue admits the job again. Each run
claims an attempt of its own, so that two runs of one attempt never meet: the later one takes the training over.
"""

import re
import socket
import time
from pathlib import Path

from filelock import FileLock

from mlpipes.errors import CorruptionError
from mlpipes.store.files import read_record, write_record
from mlpipes.store.layout import JobFolder

_NUMBERED = re.compile(r"a(\d+)\.(?:json|jsonl|claim)")


class SupersededError(Exception):
    """Another job continues the training; this one has nothing left to do."""


def claimed(folder: JobFolder, job: str) -> int:
    """The latest attempt that a job has claimed; 0 if it has claimed none."""
    found = 0
    for path in folder.claim(0).parent.glob("a*.claim"):
        try:
            if read_record(path)["job"] == job:
                found = max(found, int(path.stem[1:]))
        except (FileNotFoundError, CorruptionError, ValueError):
            continue
    return found


def claim(folder: JobFolder, job: str, first: int) -> int:
    """Claim the attempt that this run of a job's entry point is: the `first`, or in a later run the next one.

    Raises SupersededError if another job was submitted meanwhile, for the training is that one's now.
    """
    with FileLock(str(submission_lock(folder))):
        mine = claimed(folder, job)
        numbers = [0, *(int(m[1]) for path in _files(folder) if (m := _NUMBERED.fullmatch(path.name)))]
        if max(numbers) > max(mine, first):
            raise SupersededError(f"attempt {max(numbers)} of another job continues this training")
        attempt = max(mine, first) + 1 if mine else first
        write_record(folder.claim(attempt), {"job": job, "host": socket.gethostname(), "taken": time.time()})
        return attempt


def submission_lock(folder: JobFolder) -> Path:
    """What whoever submits a job of a training, or claims an attempt, holds meanwhile."""
    return folder.specification(0).parent / "submit.lock"


def _files(folder: JobFolder) -> list[Path]:
    return [*folder.specification(0).parent.iterdir(), *folder.messages(0).parent.glob("a*.jsonl")]
