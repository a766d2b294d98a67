"""The catalog: the explicit list of workloads and the scales each is offered at, and what other packages add to it.

Adding one here is one entry. Nothing in here imports torch, so that the Dagster definitions load fast; `Entry.load` imports
the implementation.
"""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from mlpipes.errors import ConfigError
from mlpipes.scales import SCALES_VARIABLE, load_scale_file
from mlpipes.workloads.entry import Entry, entry, load_workload
from mlpipes.workloads.packages import Offer, offers

__all__ = ["CATALOG", "Entry", "configured", "entry", "entry_named", "load_workload", "offered", "problems"]

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
    entry(
        "video_sr",
        "Super-resolution of video frames, ×2 to ×4, one or several at once; bundled photographs, embedded and offline",
        "mlpipes.workloads.super_resolution:video_sr",
        ["w1-b16-e28-g0", "w2-b16-e28-g0"],
    ),
)


def offered() -> tuple[Offer, ...]:
    """What other packages offer, by the entry point group `mlpipes.workloads`."""
    return offers(frozenset(entry.name for entry in CATALOG))


def problems() -> dict[str, str]:
    """What is wrong with the workloads of other packages, by workload; one with a problem may be there all the same."""
    return {offer.name: offer.problem for offer in offered() if offer.problem}


def configured() -> tuple[Entry, ...]:
    """The catalog and what other packages add to it, with the scales of the file that `$MLPIPES_SCALES` names."""
    entries = (*CATALOG, *(offer.entry for offer in offered() if offer.entry))
    if not (path := os.environ.get(SCALES_VARIABLE)):
        return entries
    # A workload that is left out for now has its scales left out as well, which is no error of the file.
    replaced = load_scale_file(Path(path), [*(e.name for e in entries), *problems()])
    return tuple(replace(e, scales=replaced.get(e.name, e.scales)) for e in entries)


def entry_named(name: str, entries: Iterable[Entry] | None = None) -> Entry:
    """A workload of a catalog (default: as configured).

    Raises ConfigError listing those that it has, or saying why one of another package is left out.
    """
    known = {entry.name: entry for entry in (configured() if entries is None else entries)}
    if name in known:
        return known[name]
    wrong = problems()
    if name in wrong:
        raise ConfigError(wrong[name])
    raise ConfigError(
        "\n".join(
            [
                f"unknown workload {name!r}; known are {', '.join(known)}. To add one, write a package (`mlpipes new`), or "
                f"an entry in {__name__}.",
                *wrong.values(),
            ]
        )
    )
