"""What trainings have imported of libraries that take long to import, noted for the warm process, which imports it ahead.

A file beside the private Ray, which outlives it. Nothing depends on it: without it, each process imports for itself.
"""

import json
import sys
from contextlib import suppress
from pathlib import Path

from mlpipes.errors import ConfigError
from mlpipes.store.files import write_atomic
from mlpipes.store.layout import home

SLOW = ("torchvision", "transformers")
"""Packages that take seconds. None looks for a GPU when it is imported, after which a fork could not use one, or starts a
thread (but for those of OpenBLAS, which knows of forks)."""


def note() -> None:
    """Note what of the slow packages this process has imported, where a private Ray has its folder."""
    found = {name for name in list(sys.modules) if name.partition(".")[0] in SLOW}
    with suppress(OSError, ConfigError):  # no training fails for it
        if _file().parent.is_dir() and not found <= (known := set(noted())):
            write_atomic(_file(), json.dumps(sorted(found | known), indent=0).encode())


def noted() -> list[str]:
    """The modules that were noted, packages before what is in them."""
    try:
        told = json.loads(_file().read_bytes())
    except (OSError, ValueError, RecursionError, ConfigError):  # none, or a broken one, which the next note replaces
        return []
    if not isinstance(told, list):
        return []
    return sorted(name for name in told if isinstance(name, str) and name.partition(".")[0] in SLOW)


def _file() -> Path:
    return home() / "ray" / "imported.json"
