"""The project's Dagster definitions, with trainings of `digits` that wait at barriers."""

from dataclasses import replace

from mlpipes.definitions import build_defs
from mlpipes.workloads.catalog import Entry, configured

IMPLEMENTATION = "mlpipes_tests.held:digits"


def held(entry: Entry) -> Entry:
    """An entry of the catalog, behind barriers if it is `digits`."""
    return replace(entry, implementation=IMPLEMENTATION) if entry.name == "digits" else entry


defs = build_defs(catalog=[held(entry) for entry in configured()])
