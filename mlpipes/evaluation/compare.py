"""Comparing two models of any partitions and times: what differs in data, settings, code, environment, and in quality."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlpipes.errors import ConfigError
from mlpipes.evaluation.records import Evaluation, evaluations_of
from mlpipes.reporting.report import Table
from mlpipes.reporting.statistics import Difference, paired, unpaired
from mlpipes.store.layout import Store
from mlpipes.store.outcome import Outcome
from mlpipes.store.recipe import Recipe
from mlpipes.store.status import find_training, trained_scales
from mlpipes.workloads.catalog import Entry, entry_named


@dataclass(frozen=True)
class ModelComparison:
    """What differs between two evaluated models."""

    names: tuple[str, str]
    differences: Mapping[str, tuple[Any, Any]]
    """Of recipe, data and environment, by dotted name."""
    metrics: Mapping[str, tuple[str, str, Difference]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The comparison for people."""
        a, b = self.names
        changed = Table("", ["what differs", a, b], [[n, x, y] for n, (x, y) in self.differences.items()])
        quality = Table(
            "", ["on test", a, b, f"{b} − {a}"], [[n, x, y, str(d)] for n, (x, y, d) in self.metrics.items()]
        )
        text = changed.markdown() if self.differences else "Recipe, data and environment are the same."
        return "\n\n".join([f"# {a} against {b}", text, quality.markdown(), *self.notes])


def evaluation_named(store: Store, entries: Iterable[Entry], name: str) -> Evaluation:
    """The latest evaluation of `workload/scale`, or of one of its trainings: `workload/scale@beginning-of-a-fingerprint`.

    Behind the `@` may also be the beginning of an MLflow run, a Dagster run, or an evaluation's name. Raises ConfigError,
    and ScaleError for a scale that neither the catalog nor the store knows.
    """
    place, _, which = name.partition("@")
    workload, _, scale = place.partition("/")
    if not scale:
        raise ConfigError(f"{name!r}: write workload/scale or workload/scale@run")
    key = entry_named(workload, entries).scale(scale, trained_scales(store, workload)).key
    found = evaluations_of(store, workload, key)
    if which:
        named = [e for e in found if e.name.startswith(which)]
        if not named:
            fingerprint = find_training(store, workload, key, which).fingerprint
            named = [e for e in found if e.meta.fingerprint == fingerprint]
        found = named
    if not found:
        raise ConfigError(f"{name} has not been evaluated; materialize {workload}/eval_report for {key}")
    return found[-1]


def compare(store: Store, first: Evaluation, second: Evaluation, metric: str) -> ModelComparison:
    """Compare two evaluations; on the same test samples pairwise, otherwise from their intervals."""
    differences = _differing(_described(store, first), _described(store, second))
    same = first.meta.split == second.meta.split and first.same_rows(second)
    metrics = {}
    for name in first.meta.estimates:
        if second.has(name):
            a, b = first.estimate(name), second.estimate(name)
            metrics[name] = (str(a), str(b), unpaired(a, b))
    notes = ["Differences of whole figures are from their intervals, as if on different samples: wider than need be."]
    if same:
        found = paired(first.scores(), second.scores())
        metrics |= {"score per sample": (f"{first.scores().mean():.4f}", f"{second.scores().mean():.4f}", found)}
        notes.append(
            f"The score per sample (greater is better; for classes its mean is {metric}) is compared on the same "
            f"{found.n:,} test samples. Test used: {found.method}, p={found.p_value:.3g}."
        )
    else:
        notes.append(
            "The two were tested on different data, so their samples cannot be paired. Test used: none; what is shown is "
            "the interval of the difference, from the two intervals (Zou and Donner)."
        )
    if first.meta.weights == second.meta.weights:
        notes.append(f"It is the same model, bit for bit (weights {first.meta.weights[:12]}).")
    names = tuple(f"{e.meta.workload}/{e.meta.scale}@{e.meta.fingerprint[:8]}" for e in (first, second))
    if names[0] == names[1]:
        names = tuple(f"{n} ({e.when})" for n, e in zip(names, (first, second), strict=True))
    return ModelComparison((names[0], names[1]), differences, metrics, notes)


def _described(store: Store, evaluation: Evaluation) -> dict[str, Any]:
    from mlpipes.data.snapshot import open_snapshot

    folder = store.training(evaluation.meta.fingerprint)
    recipe, outcome = Recipe.read(folder.recipe), Outcome.read(folder.result)
    described: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json"),
        "environment": outcome.environment,
        "precision": outcome.precision,
    }
    try:
        meta = open_snapshot(store.snapshots / recipe.snapshot).meta
    except FileNotFoundError:
        described["data"] = "gone from the store"
    else:
        described["data"] = {
            name: meta[name] for name in ("provenance", "counts", "plan", "preparation", "source_digest")
        }
    return _flat(described)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{name}.{key}" if name else str(key))
    return found


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys([*first, *second])
    return {n: (first.get(n), second.get(n)) for n in names if first.get(n) != second.get(n)}
