"""A Dagster run that trains one scale of digits, behind barriers, in a process of its own, so that tests can kill it.

`python -m mlpipes_tests.held_step <scale> <folder of the Dagster instance> [<launchpad's settings, JSON>]`; exits with
0 if the run succeeded.
"""

import json
import sys
from pathlib import Path

import dagster as dg

from mlpipes.definitions import build_defs
from mlpipes.scales import scales_of
from mlpipes.workloads.catalog import Entry
from mlpipes_tests.held_definitions import IMPLEMENTATION


def main(scale: str, folder: Path, settings: str = "{}") -> int:
    """Run it; returns the exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    entry = Entry("digits", "Digits", IMPLEMENTATION, scales_of([scale], "test"))
    chain = [dg.AssetKey(["digits", name]) for name in ("dataset", "snapshot", "checkpoints")]
    job = dg.define_asset_job("training", dg.AssetSelection.assets(*chain))
    definitions = dg.Definitions.merge(build_defs(catalog=[entry]), dg.Definitions(jobs=[job]))
    with dg.DagsterInstance.local_temp(str(folder)) as instance:
        result = definitions.resolve_job_def("training").execute_in_process(
            instance=instance,
            partition_key=scale,
            run_config={"ops": {"digits__checkpoints": {"config": json.loads(settings)}}},
            raise_on_error=False,
        )
        return 0 if result.success else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))
