"""Inside a pod: what a RayJob's entry point runs, and what a pod does when it is told to go.

Run as `python -m mlpipes.compute.kubernetes_entry <specification> <RayJob>` it claims an attempt and becomes its driver.
With `--farewell SECONDS` it asks the job's current attempt for a last checkpoint and waits for it.
"""

import argparse
import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from mlpipes.store.claims import SupersededError, claim, claimed
from mlpipes.store.environment import for_children
from mlpipes.store.layout import JobFolder, TrainingFolder
from mlpipes.store.messages import Failed, Finished, MessageWriter, Started, Stopping, Warned, read_messages
from mlpipes.store.training_job import TrainingJob

SUPERSEDED = 4
"""Exit code of a run that has nothing left to do, because another job continues the training."""
UNUSABLE, UNUSABLE_VOLUME = 5, "unusable volume: "
"""Exit code of a run that cannot read or write the store as its pod mounts it, and how it says so."""
_FOR_GOOD = (errno.ENOENT, errno.EROFS, errno.EACCES, errno.EPERM)
_VISIBLE_SECONDS = 60.0
"""How long a file may take to be seen from another machine: NFS remembers that it was not there."""
_DEAD_SECONDS = 10.0
_LOOK_SECONDS = 0.2


def main(arguments: Sequence[str]) -> int:
    """Run what is asked for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="mlpipes.compute.kubernetes_entry")
    parser.add_argument("--farewell", type=float, metavar="SECONDS")
    parser.add_argument("specification", type=Path)
    parser.add_argument("job", help="the RayJob's name")
    chosen = parser.parse_args(arguments)
    if chosen.farewell is None:
        try:
            _await(chosen.specification)
            return drive(chosen.specification, chosen.job)
        except OSError as error:
            if (
                error.errno not in _FOR_GOOD
            ):  # of a disk that is full or a server that is away, another attempt may not hear
                raise
            print(_of_volume(error, chosen.specification), file=sys.stderr)
            return UNUSABLE
    folder = TrainingFolder(chosen.specification.absolute().parents[1])
    if attempt := claimed(folder, chosen.job):
        say_farewell(folder, attempt, chosen.farewell)
    return 0


def _await(specification: Path) -> None:
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not specification.exists() and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)


def _of_volume(error: OSError, specification: Path) -> str:
    """What is wrong with the volume that the store is on, as this pod sees it."""
    compare = "`mlpipes doctor kubernetes --probe` compares what a pod sees with what is here"
    if isinstance(error, FileNotFoundError) and not specification.exists():
        said = f"{specification} is not there in the pod: `store.claim` is another volume than the run's"
        return f"{UNUSABLE_VOLUME}{said}. {compare}"
    said = f"{error.filename or specification}: {error.strerror or error}, in a pod of user {os.getuid()}"
    return f"{UNUSABLE_VOLUME}{said}: it has to write the store. {compare}"


def drive(specification: Path, rayjob: str) -> int:
    """Become the driver of a training; returns only if the training is another job's by now."""
    job = TrainingJob.read(specification)
    job.take_over()
    # What the first attempt was handed over, the next one is handed on.
    return become_claimed(
        "mlpipes.training.driver",
        specification,
        job,
        rayjob,
        lambda attempt: job.model_copy(update={"attempt": attempt}).write(),
    )


class Attempted(Protocol):
    """One attempt at something, as its specification says."""

    @property
    def folder(self) -> JobFolder:
        """Where it lies."""
        ...

    @property
    def attempt(self) -> int:
        """Its number."""
        ...


def become_claimed(
    module: str, specification: Path, job: Attempted, rayjob: str, write_again: Callable[[int], Path]
) -> int:
    """Claim the attempt that this run of a RayJob's entry point is, and become its driver, the program `module`.

    Returns only if the work is another job's by now. `write_again` writes the specification of a later attempt.
    """
    try:
        attempt = claim(job.folder, rayjob, job.attempt)
    except SupersededError as error:
        print(error, file=sys.stderr)
        return SUPERSEDED
    if attempt != job.attempt:
        specification = write_again(attempt)
        text = f"the job's entry point runs again; attempt {attempt} goes on after attempt {job.attempt}"
        MessageWriter(job.folder.messages(attempt))(Warned(text=text))
    return _become(module, specification, job.folder.log(attempt))


def _become(module: str, specification: Path, log: Path) -> int:
    """Go on as the driver of an attempt; never returns.

    What is printed is kept in the store, for the pod is gone with the job.
    """
    printed = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for stream in (1, 2):
        os.dup2(printed, stream)
    return os.execve(  # noqa: S606 - no shell
        sys.executable, [sys.executable, "-m", module, str(specification)], _environment()
    )


def _environment() -> dict[str, str]:
    """This process's, by the table; the address of this Ray, which the table drops, is the driver's."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("RAY_") or name == "PYTHONPATH"}
    return for_children() | kept


def say_farewell(folder: TrainingFolder, attempt: int, seconds: float) -> None:
    """Ask an attempt for a checkpoint and return when it is there, when there is nobody to make one, or in time.

    The attempt may go on afterwards, on other pods, and be asked again; so the request is taken back.
    """
    request, beat = folder.stop_request(attempt), folder.heartbeat(attempt)
    messages, offset = read_messages(folder.messages(attempt))
    if not any(isinstance(message, Started) for message in messages) or _is_over(messages, folder):
        return
    deadline, seen, since = time.monotonic() + seconds, _modified(beat), time.monotonic()
    try:
        while (now := time.monotonic()) < deadline:
            request.touch()  # again and again: another pod's farewell may have taken it back
            found, offset = read_messages(folder.messages(attempt), offset)
            if any(isinstance(message, Stopping) for message in found) or _is_over(found, folder):
                return
            if (current := _modified(beat)) != seen:
                seen, since = current, now
            if now - since > _DEAD_SECONDS:  # its driver is gone: nobody will answer
                return
            time.sleep(_LOOK_SECONDS)
    finally:
        request.unlink(missing_ok=True)


def _is_over(messages: Sequence[object], folder: TrainingFolder) -> bool:
    return folder.result.is_file() or any(isinstance(message, Finished | Failed) for message in messages)


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
