"""Following a video: its Ray job is submitted or found again, watched by what it leaves in the store, submitted again."""

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock

from mlpipes.compute.jobs import ALIVE, JobHandle, Jobs, JobState, JobStatus, environment_of_jobs
from mlpipes.errors import UpscalingFailedError
from mlpipes.scales import workers_of
from mlpipes.store.files import fsync, read_record, sha256_file, write_record
from mlpipes.store.heartbeat import Pulse
from mlpipes.store.identity import mark_of
from mlpipes.store.layout import Store, home
from mlpipes.store.messages import Failed, Warned, read_messages
from mlpipes.video.disk import check_disk, expected_frames
from mlpipes.video.job import SEGMENT, Encoding, Plan, VideoJob, chunk_length, suffix_of
from mlpipes.video.joining import check_container, file_of, final_of, is_done
from mlpipes.video.models import pin
from mlpipes.video.places import check_source
from mlpipes.video.probe import probe

MAX_ATTEMPTS = 5
"""Jobs in a row that got no further."""
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Progress:
    """How far a video is, in frames, by what the store holds."""

    total: int
    """As planned, or as expected while the source is cut."""
    cut: int
    upscaled: int
    encoded: int

    @property
    def all(self) -> int:
        """What grows with anything that is done."""
        return self.cut + self.upscaled + self.encoded


def prepare(
    path: Path,
    result: Path,
    store: Store,
    *,
    model: str,
    scale: int | None,
    workers: int,
    chunk: int | None = None,
    gpus_per_worker: float = 0.0,
    precision: str = "fp32",
    encoding: Encoding | None = None,
) -> VideoJob:
    """Look at everything that could be wrong, and say what is to be done; starts nothing.

    Raises DataError for a file that cannot be upscaled, ConfigError for what is asked for, PreflightError for a full disk.
    """
    workers_of(workers, gpus_per_worker, "the workers of a video")
    check_source(path)
    suffix, source = suffix_of(result), probe(path)
    job = VideoJob(
        source=source,
        source_digest=sha256_file(Path(source.path)),
        model=pin(model, scale, store, precision, device="cuda" if gpus_per_worker else "cpu"),
        encoding=encoding or Encoding(),
        suffix=suffix,
        store=str(store.root.absolute()),
        chunk=chunk_length(chunk),
        workers=workers,
        gpus_per_worker=gpus_per_worker,
    )
    source.check_unchanged()
    check_container(job)
    if final_of(job) is None:
        check_disk(job)
    return job


def progress_of(job: VideoJob) -> Progress:
    """How far a video is."""
    folder = job.folder
    try:
        total = Plan.read(folder.plan).frames
    except FileNotFoundError:
        total = expected_frames(job.source)

    def frames(part: Path, length: int) -> int:
        found = sum(1 for path in part.iterdir() if path.name.isdigit()) if part.is_dir() else 0
        return min(found * length, total or found * length)

    return Progress(
        total=total,
        cut=frames(folder.source_chunk(0).parent, job.chunk),
        upscaled=frames(folder.upscaled_chunk(0).parent, job.chunk),
        encoded=frames(folder.segment(0).parent, SEGMENT),
    )


def follow(
    job: VideoJob,
    jobs_of: Callable[[], Jobs],
    show: Callable[[Progress], None] = lambda _: None,
    warn: Callable[[str], None] = lambda _: None,
) -> None:
    """Have a video made, whoever dies meanwhile; returns when it `is_done`.

    When it is interrupted, the job goes on, for the next call to find; `stop` ends it. Raises UpscalingFailedError with
    the cause.
    """
    job.write_to(job.folder.job)
    if not is_done(job):
        job.folder.result.unlink(missing_ok=True)  # of a result that was delivered once, and is wanted again
    in_vain, reached = 0, -1
    while not is_done(job):
        now = progress_of(job).all
        in_vain, reached = (1, now) if now > reached else (in_vain + 1, reached)
        if in_vain > MAX_ATTEMPTS:
            raise UpscalingFailedError(
                f"{MAX_ATTEMPTS} jobs in a row got no further; the last one said: {_last_words(job) or 'nothing'}"
            )
        try:
            jobs = jobs_of()
            fatal = _watch(jobs, attach_or_submit(jobs, job), job, show, warn)
        except ConnectionError as error:
            warn(f"{error}; trying again")
            continue
        if fatal and not is_done(job):
            raise UpscalingFailedError(fatal)
    show(progress_of(job))


def stop(job: VideoJob, jobs: Jobs) -> None:
    """End the job of a video, if there is one; what was done is kept."""
    with suppress(ConnectionError):
        latest = jobs.latest(_name(job))
        if latest is not None and latest[1].state in ALIVE:
            jobs.stop(latest[0])


def _name(job: VideoJob) -> str:
    """The name under which a video's jobs are found: which video, and for which store."""
    return f"video-{job.fingerprint}-{mark_of(job.store)}"


def attach_or_submit(jobs: Jobs, job: VideoJob) -> JobHandle:
    """The job of a video: the one that is alive, or the next attempt, submitted."""
    folder, name = job.folder, _name(job)
    specifications = folder.specification(0).parent
    specifications.mkdir(parents=True, exist_ok=True)
    with FileLock(str(specifications / "submit.lock")):  # of two callers at once, one submits and the other attaches
        latest = jobs.latest(name)
        if latest is not None and latest[1].state in ALIVE:
            return latest[0]
        earlier = [int(path.stem[1:]) for path in specifications.glob("a*.json")]
        attempt = 1 + max([latest[0].attempt if latest else 0, *earlier])
        specification = folder.specification(attempt)
        job.model_copy(update={"attempt": attempt}).write_to(specification)
        environment = environment_of_jobs(home(), jobs.shares_machine)
        return jobs.submit(name, specification, attempt, environment, f"video {Path(job.source.path).name}")


def _watch(
    jobs: Jobs,
    handle: JobHandle,
    job: VideoJob,
    show: Callable[[Progress], None],
    warn: Callable[[str], None],
) -> str:
    """Follow an attempt to its end, and those for which its place queues it again; returns the error that is final."""
    status, asked, told = JobStatus(JobState.PENDING), float("-inf"), ""
    offset, pulse = 0, Pulse(job.folder.heartbeat(handle.attempt))
    while True:
        if time.monotonic() - asked >= jobs.poll_seconds:
            # Asked before reading, so that nothing is missed that was written before the job ended.
            status, asked = jobs.status(handle), time.monotonic()
        found, offset = read_messages(job.folder.messages(handle.attempt), offset)
        for message in found:
            if isinstance(message, Warned):
                warn(message.text)
            elif isinstance(message, Failed):
                if message.fatal:
                    with suppress(ConnectionError):  # the error counts
                        jobs.stop(handle)  # else the next call would find it, and its error
                    return message.error
                warn(message.error)
        show(progress_of(job))
        if status.state == JobState.REQUEUED:
            handle = replace(handle, attempt=status.attempt)
            offset, pulse, asked = 0, Pulse(job.folder.heartbeat(handle.attempt)), float("-inf")
            continue
        if status.state not in ALIVE:
            jobs.forget(handle, job.folder)
            if status.state != JobState.SUCCEEDED and status.reason not in ("", "None"):
                warn(f"{jobs.name} {handle.id} has ended: {status.reason}")
            return _end_of(status)
        waits = status.state == JobState.PENDING
        if waits and status.reason not in (told, "", "None"):
            told = status.reason
            warn(f"{jobs.name} {handle.id} waits: {told}")
        if pulse.is_dead(waits=waits):
            warn(f"the driver of {jobs.name} {handle.id} gives no sign of life; another goes on")
            jobs.stop(handle)
            return ""
        time.sleep(_POLL_SECONDS)


def _end_of(status: JobStatus) -> str:
    """What is final about a job that has ended; empty if another one may go on."""
    if status.state == JobState.STOPPED:
        return "the job was stopped; the same command goes on where it was"
    if status.state == JobState.REFUSED:
        return f"the job waits and can never start: {status.reason}"
    return ""


def _last_words(job: VideoJob) -> str:
    logs = sorted(job.folder.messages(0).parent.glob("a*.jsonl"), key=lambda path: path.stat().st_mtime)
    said = [m for path in logs[-1:] for m in read_messages(path)[0] if isinstance(m, Failed | Warned)]
    return str(getattr(said[-1], "error", None) or getattr(said[-1], "text", "")) if said else ""


# -- where the result goes -----------------------------------------------------------------------------------------------
def delivered(job: VideoJob, result: Path) -> bool:
    """Whether a file is what the job made, by its bytes."""
    try:
        record = read_record(job.folder.result)
    except FileNotFoundError:
        return False
    return result.is_file() and result.stat().st_size == record["bytes"] and sha256_file(result) == record["sha256"]


def deliver(job: VideoJob, result: Path) -> None:
    """Move the finished video to where the user wants it, at once or not at all, and remove its parts."""
    final = final_of(job)
    if final is None:
        raise UpscalingFailedError(f"{job.folder.final} is gone; give the same command again")
    made = file_of(job, final)
    write_record(job.folder.result, {**final.files[made.name], "file": str(result)})
    temporary = result.with_name(f".{result.name}.mlpipes-part")
    try:
        try:
            made.rename(result)
        except OSError:  # another disk
            shutil.copyfile(made, temporary)
            fsync(temporary)
            temporary.replace(result)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(result.parent)
    tidy(job)


def tidy(job: VideoJob) -> None:
    """Remove the parts of a video that was delivered."""
    for part in (*job.folder.parts, job.folder.final, job.folder.preview):
        shutil.rmtree(part, ignore_errors=True)
