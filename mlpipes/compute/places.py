"""Places: which of them trains a scale - this machine's private Ray, a Ray at an address, Slurm, or Kubernetes."""

import os
from pathlib import Path

from mlpipes.compute.address import RayAddress
from mlpipes.compute.jobs import Jobs
from mlpipes.compute.kubernetes import KubernetesJobs
from mlpipes.compute.kubernetes_settings import SETTINGS_VARIABLE as KUBERNETES_VARIABLE
from mlpipes.compute.kubernetes_settings import KubernetesSettings
from mlpipes.compute.ray_jobs import RayJobs
from mlpipes.compute.slurm import SETTINGS_VARIABLE as SLURM_VARIABLE
from mlpipes.compute.slurm import SlurmJobs, SlurmSettings
from mlpipes.errors import ConfigError
from mlpipes.scales import RayScaleConfig
from mlpipes.store.environment import value_of

ADDRESS_VARIABLE = "MLPIPES_RAY_ADDRESS"


def jobs_for(
    scale: RayScaleConfig, address: str | None = None, slurm: str | None = None, kubernetes: str | None = None
) -> Jobs:
    """Where trainings of a scale run: by the arguments, else by the environment, else on this machine.

    Raises ConfigError if more than one place is asked for, or if the settings of the place are unusable.
    """
    named = _named(address, slurm, kubernetes)
    if slurm := named.get(SLURM_VARIABLE):
        return SlurmJobs(SlurmSettings.load(Path(slurm)), scale)
    if kubernetes := named.get(KUBERNETES_VARIABLE):
        return KubernetesJobs(KubernetesSettings.load(Path(kubernetes)), scale)
    return RayJobs(resolve(address))


def is_local() -> bool:
    """Whether the environment has trainings run in this machine's private Ray.

    Raises ConfigError if it asks for two places, or if the settings of Slurm or Kubernetes are unusable.
    """
    named = _named()
    if slurm := named.get(SLURM_VARIABLE):
        SlurmSettings.load(Path(slurm))
    if kubernetes := named.get(KUBERNETES_VARIABLE):
        KubernetesSettings.load(Path(kubernetes))
    return not named


def has_queue() -> bool:
    """Whether the place queues trainings by itself, so that a slot of Dagster's, held while they wait, helps nobody."""
    return bool(os.environ.get(SLURM_VARIABLE) or os.environ.get(KUBERNETES_VARIABLE))


def _named(address: str | None = None, slurm: str | None = None, kubernetes: str | None = None) -> dict[str, str]:
    """The place that is asked for, by the variable that asks for it; empty for this machine's private Ray."""
    given = {ADDRESS_VARIABLE: address, SLURM_VARIABLE: slurm, KUBERNETES_VARIABLE: kubernetes}
    named = {name: value for name, text in given.items() if (value := text or value_of(name))}
    if len(named) > 1:
        said = " and ".join(f"{name}={value}" for name, value in named.items())
        raise ConfigError(
            f"{said} exclude each other: jobs of Slurm and Kubernetes start a Ray of their own. Unset one of them."
        )
    return named


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
