"""The project's definitions for the benchmark `ettr`: the workload `docstrings` with short evaluations (`ettr_workload`)."""

from dataclasses import replace

from mlpipes.definitions import build_defs
from mlpipes.workloads.catalog import configured

_OURS = {"docstrings": "mlpipes_tests.benchmarks.ettr_workload:docstrings"}
defs = build_defs(catalog=[replace(e, implementation=_OURS.get(e.name, e.implementation)) for e in configured()])
"""All other workloads are as they are."""
