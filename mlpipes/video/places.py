"""Where videos are upscaled: on a Ray, or as one job a video, of Slurm or Kubernetes, which holds the workers of its pool.

Slurm's batch script runs this as `python -m mlpipes.video.places <specification>`; the entry point of a RayJob on Kubernetes
with the RayJob's name behind that.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from mlpipes.compute.allocation import drive, restarts_so_far
from mlpipes.compute.jobs import JobHandle, Jobs
from mlpipes.compute.kubernetes import KubernetesJobs
from mlpipes.compute.kubernetes_entry import become_claimed
from mlpipes.compute.kubernetes_manifest import Subject
from mlpipes.compute.kubernetes_settings import SETTINGS_VARIABLE as KUBERNETES_VARIABLE
from mlpipes.compute.kubernetes_settings import KubernetesSettings
from mlpipes.compute.places import is_local, resolve
from mlpipes.compute.preflight import nodes_of
from mlpipes.compute.ray_jobs import RayJobs
from mlpipes.compute.slurm import SETTINGS_VARIABLE as SLURM_VARIABLE
from mlpipes.compute.slurm import SlurmJobs, SlurmSettings
from mlpipes.errors import PreflightError
from mlpipes.scales import workers_of
from mlpipes.store.environment import value_of
from mlpipes.store.messages import MessageWriter
from mlpipes.video.job import VideoJob
from mlpipes.video.joining import is_done

DRIVER = "mlpipes.video.driver"


class VideoRayJobs(RayJobs):
    """The Jobs API of a cluster, for videos."""

    module = DRIVER
    placed: ClassVar[set[str]] = set()
    """Videos for whose workers this process has found GPUs."""

    def submit(
        self, name: str, specification: Path, attempt: int, environment: Mapping[str, str], about: str
    ) -> JobHandle:
        """Submit an attempt. Raises PreflightError where no node has the GPUs of a worker, which would wait for ever."""
        job = VideoJob.read(specification)
        # Once a call: nodes that go later may come back.
        if (wanted := job.gpus_per_worker) and job.fingerprint not in self.placed:
            nodes = nodes_of(self.address)
            if not any(node.gpus >= wanted for node in nodes):
                raise PreflightError(
                    f"a worker needs {wanted:g} GPUs, and no node of Ray has as many. It has "
                    f"{'; '.join(map(str, nodes)) or 'no living node'}. Leave --gpus-per-worker out to use CPUs"
                )
            self.placed.add(job.fingerprint)
        return super().submit(name, specification, attempt, environment, about)

    def _threads(self, specification: Path) -> int:
        return 1

    def _reserved(self, specification: Path) -> dict[str, Any]:
        return {}  # the driver reads the source and joins the result: little beside what its workers do


class VideoSlurmJobs(SlurmJobs):
    """The batch jobs of videos with so many workers. What differs for them in the settings is said of their scale's key."""

    module = "mlpipes.video.places"


class VideoKubernetesJobs(KubernetesJobs):
    """The RayJobs of videos; settings as for trainings of their scale's key."""

    def _subject(self, specification: Path) -> Subject:
        job = VideoJob.read(specification)
        self.settings.check_visible(Path(job.source.path))
        return Subject(
            workload="video",
            fingerprint=job.fingerprint,
            folder=job.folder,
            store=job.store,
            requested_by=job.requested_by,
            entry="mlpipes.video.places",
            is_training=False,
        )


def check_place() -> None:
    """Raises ConfigError if the environment asks for two places, or for one with unusable settings."""
    is_local()


def check_source(source: Path) -> None:
    """Raises ConfigError if the place does not see a file."""
    if settings := value_of(KUBERNETES_VARIABLE):
        KubernetesSettings.load(Path(settings)).check_visible(source)


def place_for(job: VideoJob, address: str | None = None) -> Jobs:
    """Where a video is upscaled: Slurm, Kubernetes, the Ray at an address, or this machine's, started if need be.

    `address` is of a Ray; default as configured. Raises ConfigError as `check_place` does.
    """
    check_place()
    scale = workers_of(job.workers, job.gpus_per_worker, "the workers of a video")
    if settings := value_of(SLURM_VARIABLE):
        return VideoSlurmJobs(SlurmSettings.load(Path(settings)), scale)
    if settings := value_of(KUBERNETES_VARIABLE):
        return VideoKubernetesJobs(KubernetesSettings.load(Path(settings)), scale)
    return VideoRayJobs(resolve(address))


def main(path: Path, rayjob: str | None = None) -> int:
    """Run one attempt of a video in this allocation of Slurm's, or in this pod; returns the exit code."""
    return _in_allocation(path) if rayjob is None else _in_pod(path, rayjob)


def _in_allocation(path: Path) -> int:
    job = VideoJob.read(path)
    if restarts := restarts_so_far():
        path, job = _next(job, job.attempt + restarts)
    notify = MessageWriter(job.folder.messages(job.attempt))
    # Nothing is left to save: each part is published when it is done.
    return drive(DRIVER, path, notify, save=lambda: None, is_done=lambda: is_done(job))


def _in_pod(path: Path, rayjob: str) -> int:
    job = VideoJob.read(path)
    return become_claimed(DRIVER, path, job, rayjob, lambda attempt: _next(job, attempt)[0])


def _next(job: VideoJob, attempt: int) -> tuple[Path, VideoJob]:
    """Another attempt at the same, and its specification."""
    job = job.model_copy(update={"attempt": attempt})
    path = job.folder.specification(attempt)
    job.write_to(path)
    return path, job


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
