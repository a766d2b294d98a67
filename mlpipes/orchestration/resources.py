"""Dagster resources: they hold configuration and hand out objects of the layers below."""

from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field, PrivateAttr

from mlpipes.errors import ConfigError
from mlpipes.orchestration.metadata import user_errors
from mlpipes.orchestration.store_identity import check_store
from mlpipes.store.identity import identify
from mlpipes.store.layout import R, Store, default_store
from mlpipes.store.references import REFERENCES, Reference

if TYPE_CHECKING:
    from mlpipes.compute.jobs import Jobs
    from mlpipes.scales import RayScaleConfig
    from mlpipes.tracking.runs import Tracker


STORE = "store"
"""Metadata of a materialization: the id of the store that it lies in."""


class StoreResource(dg.ConfigurableResource):
    """The folder of all results."""

    root: str | None = Field(default=None, description="default: `store` in the home folder ($MLPIPES_HOME)")
    _unchecked: dg.DagsterInstance | None = PrivateAttr(default=None)

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Note whose history the run is in; looked at on first use, where an error is a step's and not the run's."""
        self._unchecked = context.instance

    @property
    def store(self) -> Store:
        """The store itself. In a run, raises ConfigError if Dagster's history is about another one."""
        store = Store(Path(self.root).absolute()) if self.root else default_store()
        if self._unchecked is not None:
            check_store(self._unchecked, store)
            self._unchecked = None
        return store


class RayResource(dg.ConfigurableResource):
    """Where the Ray is that trains: on this machine, at an address, in allocations of Slurm, or in pods."""

    address: str | None = Field(
        default=None,
        description="http://host:8265 of the head's dashboard; default $MLPIPES_RAY_ADDRESS, else a private local Ray",
    )
    slurm: str | None = Field(
        default=None, description="file with the settings of Slurm, which then trains; default $MLPIPES_SLURM"
    )
    kubernetes: str | None = Field(
        default=None,
        description="file with the settings of Kubernetes, which then trains; default $MLPIPES_KUBERNETES",
    )

    def jobs(self, scale: "RayScaleConfig") -> "Jobs":
        """Where the trainings of a scale run; starts the private local Ray if that is meant and it does not run."""
        from mlpipes.compute.places import jobs_for

        return jobs_for(scale, self.address, self.slurm, self.kubernetes)


class MlflowResource(dg.ConfigurableResource):
    """Where runs are tracked and models registered."""

    tracking_uri: str | None = Field(
        default=None, description="default $MLFLOW_TRACKING_URI, else SQLite in the home folder"
    )

    def tracker(self) -> "Tracker":
        """MLflow at that address."""
        from mlpipes.tracking.runs import Tracker, default_uri

        return Tracker(self.tracking_uri or default_uri())


class ReferenceIOManager(dg.ConfigurableIOManager):
    """Hands references from asset to asset; what they refer to lies in the store, verified when opened."""

    store: StoreResource

    def handle_output(self, context: dg.OutputContext, obj: Reference) -> None:
        """Record what this partition of the asset now points to."""
        with user_errors():
            store = self.store.store
        store.write_reference(obj, context.asset_key.path[0], context.partition_key)
        context.add_output_metadata({STORE: identify(store)})

    def load_input(self, context: dg.InputContext) -> Reference:
        """What the upstream asset's partition points to."""
        workload, asset = context.asset_key.path
        with user_errors():
            return materialized(REFERENCES[asset], self.store.store, workload, context.partition_key)


def materialized(kind: type[R], store: Store, workload: str, scale: str) -> R:
    """What the partition of an asset points to. Raises ConfigError if it was never materialized."""
    reference = store.read_reference(kind, workload, scale)
    if reference is None:
        raise ConfigError(f"{workload}/{kind.asset} was never materialized for {scale}; materialize it first")
    return reference
