"""Gates: what a model must show before it may become champion, by its evaluation and the ones before."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlpipes.evaluation.records import Evaluation
from mlpipes.reporting.metric import Metric
from mlpipes.reporting.statistics import Difference, paired

BLOCKING = ("floor", "regression")
"""Gates that hold a model back; the others warn."""
REMEMBERED = 14
"""Good evaluations that the drift gate looks back over."""
BASELINE, CALIBRATION = "baseline", "expected_calibration_error"


@dataclass(frozen=True)
class Limits:
    """Where the gates stand."""

    floor: float | None = None
    """Least value of the metric, or the greatest where lower is better; None: its whole interval must be better than the
    baseline, what blind guessing reaches."""
    significance: float = 0.01
    """A model counts as worse if chance explains the difference with less than this probability."""
    calibration_error: float = 0.1


@dataclass(frozen=True)
class Finding:
    """What one gate says."""

    passed: bool
    text: str
    figures: dict[str, float] = field(default_factory=dict)


def floor(current: Evaluation, metric: Metric, limits: Limits) -> Finding:
    """The metric is good enough: a floor where higher is better, a ceiling where lower is."""
    found, name = current.estimate(metric.name), metric.name
    if limits.floor is not None:
        passed = metric.score(found.value) >= metric.score(limits.floor)
        limit = "floor" if metric.higher_is_better else "ceiling"
        return Finding(passed, f"{name} {found}, {limit} {limits.floor}", {name: found.value})
    baseline = current.meta.quantities.get(BASELINE)
    if baseline is None:
        return Finding(
            True, f"{name} {found}; not compared, for the task has no baseline: set `floor`", {name: found.value}
        )
    worst = min(metric.score(found.low), metric.score(found.high))
    return Finding(
        worst > metric.score(baseline),
        f"{name} {found}, blind guessing {baseline:.4f}",
        {name: found.value, BASELINE: baseline},
    )


def regression(current: Evaluation, before: Sequence[Evaluation], limits: Limits) -> Finding:
    """Not worse than the last good evaluation of the partition on the same samples, of whatever snapshot."""
    good = [evaluation for evaluation in before if evaluation.is_good]
    if not good:
        return Finding(True, "the first one: there is no good evaluation to compare with")
    same = [evaluation for evaluation in good if evaluation.same_rows(current)]
    if not same:
        return Finding(
            True,
            f"not comparable with the last good one ({good[-1].when}): that was on other test samples, of snapshot "
            f"{good[-1].meta.snapshot[:12]}",
        )
    return _compared(current, same[-1], f"the last good one ({same[-1].when})", limits)


def drift(current: Evaluation, before: Sequence[Evaluation], metric: Metric, limits: Limits) -> Finding:
    """Not worse than the best of the last good ones: many small steps down that each pass are noticed here."""
    good = [e for e in before if e.is_good and e.has(metric.name) and e.same_rows(current)][-REMEMBERED:]
    if not good:
        return Finding(True, "there is no good evaluation on these test samples to compare with")
    best = max(good, key=lambda evaluation: metric.score(evaluation.estimate(metric.name).value))
    return _compared(current, best, f"the best of the last {len(good)} good ones ({best.when})", limits)


def calibration(current: Evaluation, limits: Limits) -> Finding:
    """Confidence says how often the model is right; passes where a task has no confidence."""
    error = current.meta.quantities.get(CALIBRATION)
    if error is None:
        return Finding(True, "this task has no confidence to calibrate")
    text = f"expected calibration error {error:.4f}, limit {limits.calibration_error}"
    return Finding(error <= limits.calibration_error, text, {CALIBRATION: error})


def _compared(current: Evaluation, other: Evaluation, name: str, limits: Limits) -> Finding:
    found: Difference = paired(other.scores(), current.scores())
    text = f"against {name}: {found}" + (", the same weights" if _same_weights(current, other) else "")
    assert found.p_value is not None  # noqa: S101 - paired
    return Finding(not found.is_worse(limits.significance), text, {"difference": found.value, "p_value": found.p_value})


def _same_weights(first: Evaluation, second: Evaluation) -> bool:
    return first.meta.weights == second.meta.weights


def summary(verdict: Mapping[str, Any] | None) -> str:
    """A verdict in a few words."""
    if verdict is None:
        return "not asked"
    failed = [name for name, gate in verdict["gates"].items() if not gate["passed"]]
    held, warned = [n for n in failed if n in BLOCKING], [n for n in failed if n not in BLOCKING]
    words = f"HELD by {', '.join(held)}" if held else "passed" if verdict["passed"] else "not all asked"
    return f"{words}; warning: {', '.join(warned)}" if warned else words


def pass_through(
    current: Evaluation,
    before: Sequence[Evaluation],
    metric: Metric,
    limits: Limits,
    only: Sequence[str] | None = None,
) -> dict[str, Finding]:
    """What the gates say about an evaluation; the verdict is recorded beside it."""
    gates: dict[str, Callable[[], Finding]] = {
        "floor": lambda: floor(current, metric, limits),
        "regression": lambda: regression(current, before, limits),
        "calibration": lambda: calibration(current, limits),
        "drift": lambda: drift(current, before, metric, limits),
    }
    found = {name: gate() for name, gate in gates.items() if only is None or name in only}
    earlier: dict[str, Any] = (current.verdict or {}).get("gates", {})
    gathered = earlier | {name: {"passed": f.passed, "text": f.text, **f.figures} for name, f in found.items()}
    passed = all(name in gathered and gathered[name]["passed"] for name in BLOCKING)
    current.record({"passed": passed, "gates": gathered})
    return found
