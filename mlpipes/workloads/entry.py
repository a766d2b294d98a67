"""An entry: a workload as everything but its own processes sees it, its name, summary and scales; no torch in here."""

import importlib
import os
import re
import sysconfig
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpipes.errors import ConfigError, ScaleError, UserError
from mlpipes.scales import SCALES_VARIABLE, RayScaleConfig, scales_of

if TYPE_CHECKING:
    from mlpipes.workloads.base import Workload

_INSTALLED = f"{os.sep}site-packages{os.sep}"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def check_name(name: str) -> None:
    """Raises ConfigError if a workload cannot be called so."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name for a workload, for it names assets, jobs and folders: write letters from A to Z, digits "
            "and underscores, a letter first"
        )


@dataclass(frozen=True)
class Entry:
    """One workload as the asset layer sees it."""

    name: str
    summary: str
    implementation: str
    """`module:attribute` of the workload instance."""
    scales: tuple[RayScaleConfig, ...]
    kind: str = "pytorch"

    def __post_init__(self) -> None:
        """Raises ConfigError if the name is none for Dagster, or the implementation is not written `module:attribute`."""
        check_name(self.name)
        if not all(self.implementation.partition(":")):
            raise ConfigError(
                f"workload {self.name}: {self.implementation!r} is no implementation; write 'package.module:instance'"
            )

    def load(self) -> "Workload":
        """The workload itself; imports torch."""
        return load_workload(self.implementation)

    def scale(self, key: str, trained: Iterable[str] = ()) -> RayScaleConfig:
        """One of its scales by partition key, or one of `trained`: keys that may have been in the catalog once.

        Raises ScaleError, which says what there is and how to add one, for a key that is malformed or in neither.
        `trained` is only read for a key that the catalog lacks.
        """
        declared = [scale.key for scale in self.scales]
        if key in declared or key in (others := list(trained)):
            return RayScaleConfig.from_key(key)
        known = ", ".join(declared) + (f"; trained before: {', '.join(others)}" if others else "")
        try:
            wanted = RayScaleConfig.from_key(key).key
        except ScaleError as error:
            raise ScaleError(f"{error}\n{self.name} has {known}.") from error
        if path := os.environ.get(SCALES_VARIABLE):
            how = f"add it under `{self.name}:` in {path}, the file that {SCALES_VARIABLE} names."
        else:
            how = (
                f"name a file with all scales that {self.name} is to have in {SCALES_VARIABLE}, for example\n"
                f"{self.name}:\n  [{', '.join([*declared, wanted])}]"
            )
        raise ScaleError(f"{self.name} has no scale {key}; it has {known}.\nTo have it, {how}")


def entry(name: str, summary: str, implementation: str, scales: Iterable[str]) -> Entry:
    """An entry with its scales given as keys. Raises ConfigError or ScaleError for what is not valid."""
    return Entry(name, summary, implementation, scales_of(scales, f"catalog, workload {name}"))


def load_workload(implementation: str) -> "Workload":
    """The workload instance at `module:attribute`. Raises ConfigError if there is none, its module does not
    load, or it is of before a renaming.
    """
    module, _, attribute = implementation.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except UserError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(f"workload {implementation!r} cannot be loaded: {cause_of(error)}") from error
    from mlpipes.reporting.metric import Metric
    from mlpipes.workloads.base import Workload

    if not isinstance(found, Workload):
        raise ConfigError(f"workload {implementation!r} is no instance of a Workload: {found!r}")
    if not isinstance(getattr(found, "metric", None), Metric):
        raise ConfigError(
            f'workload {implementation!r} has no metric: say `metric = Metric("accuracy")`, of mlpipes.reporting.metric '
            "(it was called primary_metric)"
        )
    if callable(getattr(found, "rank", None)):  # it would be passed over, and another checkpoint be the best
        raise ConfigError(
            f"workload {implementation!r} has a method `rank`, which is called `selection_key` now: rename it (or remove "
            "it, where the metric decides)"
        )
    return found


def cause_of(error: BaseException) -> str:
    """An error of a user's code in one line, with the place in that code that led to it, where there is one."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    place = place_of(error) or place_of(error, installed=True)
    return f"{type(error).__name__}: {error}{place and f' ({place})'}"


def place_of(error: BaseException, *, installed: bool = False) -> str:
    """The last line on an error's way that is neither Python's nor mlpipes'; empty if there is none.

    Libraries pass for a user's code only where what is `installed` counts, too.
    """
    others = (f"{Path(__file__).parents[1]}{os.sep}", f"{sysconfig.get_paths()['stdlib']}{os.sep}", "<")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        is_library = _INSTALLED in frame.filename
        if installed if is_library else not frame.filename.startswith(others):
            return f"{frame.filename}, line {frame.lineno}"
    return ""
