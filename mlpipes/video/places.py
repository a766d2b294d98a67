"""Where videos are upscaled: on a Ray, or on Slurm as one batch job a video, whose allocation holds the workers of its pool.

Slurm's batch script runs this as `python -m mlpipes.video.places <specification>`.
"""

import sys
from pathlib import Path
from typing import Any

from mlpipes.compute.allocation import drive, restarts_so_far
from mlpipes.compute.jobs import Jobs
from mlpipes.compute.kubernetes_settings import SETTINGS_VARIABLE as KUBERNETES_VARIABLE
from mlpipes.compute.places import is_local, resolve
from mlpipes.compute.ray_jobs import RayJobs
from mlpipes.compute.slurm import SETTINGS_VARIABLE as SLURM_VARIABLE
from mlpipes.compute.slurm import SlurmJobs, SlurmSettings
from mlpipes.errors import ConfigError
from mlpipes.scales import RayScaleConfig
from mlpipes.store.environment import value_of
from mlpipes.store.messages import MessageWriter
from mlpipes.video.job import VideoJob
from mlpipes.video.joining import is_done

DRIVER = "mlpipes.video.driver"


class VideoRayJobs(RayJobs):
    """The Jobs API of a cluster, for videos."""

    module = DRIVER

    def _reserved(self, specification: Path) -> dict[str, Any]:
        return {}  # the driver reads the source and joins the result: little beside what its workers do


class VideoSlurmJobs(SlurmJobs):
    """The batch jobs of videos with so many workers. What differs for them in the settings is said of `scale`'s key."""

    module = "mlpipes.video.places"

    def __init__(self, settings: SlurmSettings, workers: int, gpus_per_worker: float = 0.0) -> None:
        scale = RayScaleConfig(workers=workers, batch_size=workers, epochs=1, gpus_per_worker=gpus_per_worker)
        super().__init__(settings, scale)


def check_place() -> None:
    """Raises ConfigError if the environment asks for two places, for one with unusable settings, or for Kubernetes."""
    if settings := value_of(KUBERNETES_VARIABLE):
        raise ConfigError(
            f"{KUBERNETES_VARIABLE}={settings}: videos are not upscaled on Kubernetes yet. Unset it to use this machine"
        )
    is_local()


def place_for(job: VideoJob, address: str | None = None) -> Jobs:
    """Where a video is upscaled: Slurm, the Ray at an address, or this machine's, started if need be.

    `address` is of a Ray; default as configured. Raises ConfigError as `check_place` does.
    """
    check_place()
    if settings := value_of(SLURM_VARIABLE):
        return VideoSlurmJobs(SlurmSettings.load(Path(settings)), job.workers, job.gpus_per_worker)
    return VideoRayJobs(resolve(address))


def main(path: Path) -> int:
    """Run one attempt of a video in this allocation of Slurm's; returns the exit code."""
    job = VideoJob.read(path)
    if restarts := restarts_so_far():
        job = job.model_copy(update={"attempt": job.attempt + restarts})
        path = job.folder.specification(job.attempt)
        job.write_to(path)
    notify = MessageWriter(job.folder.messages(job.attempt))
    # Nothing is left to save: each part is published when it is done.
    return drive(DRIVER, path, notify, save=lambda: None, is_done=lambda: is_done(job))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
