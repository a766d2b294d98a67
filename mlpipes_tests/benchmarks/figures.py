"""Figures: what a benchmark measured, passed to `make bench` beside the table that it prints."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

FILE_VARIABLE = "MLPIPES_BENCHMARK_FIGURES"
"""Where figures go; nowhere if it is not set."""


def record(name: str, unit: str, values: Iterable[float]) -> None:
    """Pass on all values of one figure, one a round, with their unit (such as "images a CPU-second")."""
    if path := os.environ.get(FILE_VARIABLE):
        with Path(path).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"name": name, "unit": unit, "values": list(values)}) + "\n")
