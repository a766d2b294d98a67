"""Places: which of them trains a scale - this machine's private Ray, a Ray at an address, or Slurm."""

import os
from pathlib import Path

from mlpipes.compute.address import ADDRESS_VARIABLE, resolve
from mlpipes.compute.jobs import Jobs
from mlpipes.compute.ray_jobs import RayJobs
from mlpipes.compute.slurm import SETTINGS_VARIABLE, SlurmJobs, SlurmSettings
from mlpipes.errors import ConfigError
from mlpipes.scales import RayScaleConfig


def jobs_for(scale: RayScaleConfig, address: str | None = None, slurm: str | None = None) -> Jobs:
    """Where trainings of a scale run: by the arguments, else by the environment, else on this machine.

    Raises ConfigError if both a Ray and Slurm are asked for, or if the settings of Slurm are unusable.
    """
    address, slurm = address or os.environ.get(ADDRESS_VARIABLE), slurm or os.environ.get(SETTINGS_VARIABLE)
    if slurm and address:
        raise ConfigError(
            f"{ADDRESS_VARIABLE}={address} and {SETTINGS_VARIABLE}={slurm} exclude each other: a Slurm job starts a Ray of "
            "its own. Unset one of them."
        )
    if slurm:
        return SlurmJobs(SlurmSettings.load(Path(slurm)), scale)
    return RayJobs(resolve(address))
