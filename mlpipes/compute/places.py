"""Places: which of them trains a scale - this machine's private Ray, a Ray at an address, or Slurm."""

from pathlib import Path

from mlpipes.compute.address import RayAddress
from mlpipes.compute.jobs import Jobs
from mlpipes.compute.ray_jobs import RayJobs
from mlpipes.compute.slurm import SETTINGS_VARIABLE, SlurmJobs, SlurmSettings
from mlpipes.errors import ConfigError
from mlpipes.scales import RayScaleConfig
from mlpipes.store.environment import value_of

ADDRESS_VARIABLE = "MLPIPES_RAY_ADDRESS"


def jobs_for(scale: RayScaleConfig, address: str | None = None, slurm: str | None = None) -> Jobs:
    """Where trainings of a scale run: by the arguments, else by the environment, else on this machine.

    Raises ConfigError if both a Ray and Slurm are asked for, or if the settings of Slurm are unusable.
    """
    address, slurm = address or value_of(ADDRESS_VARIABLE), slurm or value_of(SETTINGS_VARIABLE)
    _check_one(address, slurm)
    if slurm:
        return SlurmJobs(SlurmSettings.load(Path(slurm)), scale)
    return RayJobs(resolve(address))


def is_local() -> bool:
    """Whether the environment has trainings run in this machine's private Ray.

    Raises ConfigError if it asks for two places, or if the settings of Slurm are unusable.
    """
    address, slurm = value_of(ADDRESS_VARIABLE), value_of(SETTINGS_VARIABLE)
    _check_one(address, slurm)
    if slurm:
        SlurmSettings.load(Path(slurm))
    return not (address or slurm)


def _check_one(address: str | None, slurm: str | None) -> None:
    if slurm and address:
        raise ConfigError(
            f"{ADDRESS_VARIABLE}={address} and {SETTINGS_VARIABLE}={slurm} exclude each other: a Slurm job starts a Ray of "
            "its own. Unset one of them."
        )


def resolve(address: str | None = None) -> RayAddress:
    """The cluster at an address (default `$MLPIPES_RAY_ADDRESS`), or this machine's private one, started if need be."""
    address = address or value_of(ADDRESS_VARIABLE)
    if not address:
        from mlpipes.compute.local import LocalRay

        return LocalRay().ensure()
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"{ADDRESS_VARIABLE}={address}: give the address of the head's dashboard, such as http://ray-head:8265"
        )
    return RayAddress(address.rstrip("/"))
