"""Workloads of other packages, found by their entry points; what is wrong with one of them keeps none of the others away."""

import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from mlpipes.errors import UserError
from mlpipes.workloads.entry import Entry, cause_of

GROUP = "mlpipes.workloads"


@dataclass(frozen=True)
class Offer:
    """What the installed packages offer under one name: an entry, or what is wrong with it."""

    name: str
    packages: str
    """The distributions that offer it, with their versions; more than one is a collision."""
    entry: Entry | None
    problem: str = ""
    """Why there is no entry, or what to mend although there is one; names package, entry point and remedy."""


@cache
def offers(taken: frozenset[str]) -> tuple[Offer, ...]:
    """What the packages of this environment offer, by name; `taken` are names that none of them may have.

    Imports the modules of the entries, once a process; those import no torch, or the offer says that they do.
    """
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    return tuple(_offer(name, points, taken) for name, points in sorted(found.items()))


def _offer(name: str, points: list[EntryPoint], taken: frozenset[str]) -> Offer:
    packages = " and ".join(sorted(map(_package, points)))
    where = " and ".join(sorted(f"`{point.name} = {point.value}`" for point in points))
    where = f"workload {name!r} of {packages} (entry point {where} of the group {GROUP})"
    had_torch = "torch" in sys.modules
    try:
        entry = _loaded(points, taken)
    except UserError as error:
        return Offer(name, packages, None, f"{where} is left out: {error}")
    if "torch" in sys.modules and not had_torch:
        return Offer(
            name,
            packages,
            entry,
            f"{where} imports torch where it says what it is, so every process of Dagster and every command takes seconds "
            "and hundreds of MB more. Put the entry into a module that imports no torch, and let the package's "
            "__init__.py import none either; have the entry point name that module.",
        )
    return Offer(name, packages, entry)


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "a package without a name"


def _loaded(points: list[EntryPoint], taken: frozenset[str]) -> Entry:
    """The entry behind the one point that there may be. Raises UserError with cause and remedy."""
    point = points[0]
    if point.name in taken:
        raise UserError("mlpipes has a workload of that name. Rename yours: entry point, and name of the entry.")
    if len(points) > 1:
        raise UserError("a name can have one owner. Rename one of them, or uninstall its package.")
    try:
        entry = point.load()
    except (Exception, SystemExit) as error:
        raise UserError(f"it does not load: {cause_of(error)}. Mend the package, or uninstall it.") from error
    if not isinstance(entry, Entry):
        raise UserError(
            f"it is no Entry but {type(entry).__name__}. Have the entry point name what `entry(…)` of "
            "mlpipes.workloads.catalog made."
        )
    if entry.name != point.name:
        raise UserError(f"the entry calls itself {entry.name!r}. Give entry and entry point the same name.")
    return entry
