"""What trainings have imported of libraries that take long to import, noted for the warm process, which imports it ahead.

A file beside the private Ray, which outlives it. Nothing depends on it: without it, each process imports for itself.
"""

import json
import re
import sys
from contextlib import suppress
from pathlib import Path

from mlpipes.errors import ConfigError
from mlpipes.store.files import write_atomic
from mlpipes.store.layout import home

_SLOW = re.compile(r"torchvision|transformers|transformers\.models\.\w+(\.modeling_\w+)?")
"""Modules that take seconds, with all that they import. BERT's, the auto classes and torchvision were seen not to look for a
GPU then, after which a fork could not use one, and to start no threads but OpenBLAS's, which knows of forks. Not all modules
of transformers are wanted: what a setting brings in, such as one of `transformers.integrations`, may import anything."""


def note() -> None:
    """Note what of the slow modules this process has imported, where a private Ray has its folder."""
    found = set(filter(_SLOW.fullmatch, list(sys.modules)))
    with suppress(OSError, ConfigError):  # no training fails for it
        if _file().parent.is_dir() and not found <= (known := set(noted())):
            write_atomic(_file(), json.dumps(sorted(found | known), indent=0).encode())


def noted() -> list[str]:
    """The modules that were noted, packages before what is in them; whatever else stands there is passed over."""
    try:
        told = json.loads(_file().read_bytes())
    except (OSError, ValueError, RecursionError, ConfigError):  # none, or a broken one, which the next note replaces
        return []
    return (
        sorted(name for name in told if isinstance(name, str) and _SLOW.fullmatch(name))
        if isinstance(told, list)
        else []
    )


def _file() -> Path:
    return home() / "ray" / "imported.json"
