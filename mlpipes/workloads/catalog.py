"""The catalog: the explicit list of workloads and the scales each is offered at. Adding one is one entry here.

Nothing in here imports torch, so that the Dagster definitions load fast; `Entry.load` imports the implementation.
"""

import importlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpipes.errors import ConfigError, ScaleError
from mlpipes.scales import SCALES_VARIABLE, RayScaleConfig, load_scale_file, scales_of

if TYPE_CHECKING:
    from mlpipes.workloads.base import Workload


@dataclass(frozen=True)
class Entry:
    """One workload as the asset layer sees it."""

    name: str
    summary: str
    implementation: str
    """`module:attribute` of the workload instance."""
    scales: tuple[RayScaleConfig, ...]
    kind: str = "pytorch"

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
    """A catalog entry with its scales given as keys."""
    return Entry(name, summary, implementation, scales_of(scales, f"catalog, workload {name}"))


CATALOG = (
    entry(
        "digits",
        "Handwritten digits (scikit-learn, 1,797 images of 8×8 pixels), embedded and offline",
        "mlpipes.workloads.image_classification:digits",
        ["w1-b128-e30-g0", "w2-b128-e30-g0", "w4-b128-e30-g0-c0.5"],
    ),
    entry(
        "cifar10",
        "CIFAR-10 photographs (32×32 pixels, 10 classes), airbench-style network with Muon",
        "mlpipes.workloads.image_classification:cifar10",
        ["w1-b256-e12-g0", "w2-b256-e12-g0", "w4-b256-e12-g0", "w1-b2048-e8-g1", "w4-b2048-e8-g1"],
    ),
    entry(
        "docstrings",
        "Which library a paragraph of documentation comes from; a tiny BERT from scratch, embedded and offline",
        "mlpipes.workloads.text_classification:docstrings",
        ["w1-b64-e6-g0", "w2-b64-e6-g0", "w4-b64-e6-g0-c0.5"],
    ),
    entry(
        "sst2",
        "GLUE SST-2, the sentiment of sentences from film reviews; fine-tuned BERT",
        "mlpipes.workloads.text_classification:sst2",
        ["w1-b32-e2-g0", "w2-b32-e2-g0", "w4-b32-e2-g0", "w1-b128-e3-g1", "w4-b128-e3-g1"],
    ),
)


def load_workload(implementation: str) -> "Workload":
    """The workload instance at `module:attribute`. Raises ConfigError if there is none."""
    module, _, attribute = implementation.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"workload {implementation!r} cannot be loaded: {error}") from error
    return found


def configured(entries: Iterable[Entry] = CATALOG) -> tuple[Entry, ...]:
    """The catalog with the scales of the file that `$MLPIPES_SCALES` names, where it names one."""
    entries = tuple(entries)
    if not (path := os.environ.get(SCALES_VARIABLE)):
        return entries
    replaced = load_scale_file(Path(path), [e.name for e in entries])
    return tuple(replace(e, scales=replaced.get(e.name, e.scales)) for e in entries)


def entry_named(name: str, entries: Iterable[Entry] | None = None) -> Entry:
    """A workload of a catalog (default: as configured). Raises ConfigError listing those that it has."""
    known = {entry.name: entry for entry in (configured() if entries is None else entries)}
    if name not in known:
        raise ConfigError(
            f"unknown workload {name!r}; known are {', '.join(known)}. To add one, write an entry in {__name__}."
        )
    return known[name]
