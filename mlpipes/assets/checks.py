"""Asset checks: what is judged about a partition besides its figures."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import dagster as dg
from pydantic import Field

from mlpipes.assets.metadata import user_errors
from mlpipes.resources import RayResource, StoreResource
from mlpipes.workloads.catalog import Entry

REPLAY = "replay"


class ReplayConfig(dg.Config):
    """Whether the check runs: it costs another training."""

    enabled: bool = Field(default=False, description="train a second time elsewhere, and compare bit for bit")


def partition_check(asset: dg.AssetKey, partitions: dg.PartitionsDefinition[Any], name: str, description: str) -> Any:
    """The decorator of a check of one partition that may also decide to say nothing.

    Checks with partitions are in preview: the one place that uses that API, and keeps its warning quiet, is here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)
        spec = dg.AssetCheckSpec(name, asset=asset, description=description, partitions_def=partitions)

    def decorate(function: Callable[..., Any]) -> dg.AssetChecksDefinition:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dg.PreviewWarning)
            return dg.multi_asset_check(name=f"{'__'.join(asset.path)}__{name}", specs=[spec], can_subset=True)(
                function
            )

    return decorate


def replay_check(entry: Entry, partitions: dg.PartitionsDefinition[Any]) -> dg.AssetChecksDefinition:
    """Whether a scale's training comes out the same when it is done again; says nothing unless it is enabled."""
    asset = dg.AssetKey([entry.name, "checkpoints"])

    @partition_check(
        asset,
        partitions,
        REPLAY,
        "The same training done again elsewhere gives the same bits (config: `enabled: true`).",
    )
    def check(
        context: dg.AssetCheckExecutionContext, config: ReplayConfig, store: StoreResource, ray: RayResource
    ) -> Iterator[dg.AssetCheckResult]:
        if not config.enabled:
            context.log.info("not asked for; set `enabled: true` to train a second time and compare")
            return
        from mlpipes.compute.jobs import RayJobs
        from mlpipes.replay import find_training, replay

        with user_errors():
            folder = find_training(store.store, entry.name, context.partition_key)
            found = replay(store.store, folder, lambda: RayJobs(ray.connect()))
        yield dg.AssetCheckResult(
            passed=found.equal,
            asset_key=asset,
            check_name=REPLAY,
            metadata={"comparison": dg.MetadataValue.md(found.markdown()), "seconds": found.seconds},
        )

    return check
