"""Temperature scaling: one number that a classifier's logits are divided by, so that its confidence is right.

Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv:1706.04599). Which class is the most probable stays.
"""

from typing import TYPE_CHECKING

import numpy as np

from mlpipes.store.calibration import Calibration

if TYPE_CHECKING:
    from collections.abc import Callable

TEMPERATURE = "temperature"
BOUNDS = (0.01, 100.0)
"""Temperatures that are considered."""
FEWEST = 30
"""Of fewer samples, a temperature says more about chance than about the model."""
FEWEST_WRONG = 10
"""Of fewer mistakes, likelihood alone would be sure of the rest beyond what they tell."""
_GAIN = 1e-9
"""Of likelihood, below which there is none."""
_DIGITS = 4
"""Digits of a temperature: the last bits of logits, which differ between machines, give no other export."""


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> Calibration:
    """The temperature that makes `labels` int (N,) the most likely by `logits` float (N, C), in float64.

    None is applied where it would not make them more likely, and where there is nothing to fit it to: `note` says why.
    """
    n = len(labels)

    def as_trained(why: str, before: float | None = None) -> Calibration:
        return Calibration(n=n, before=before, note=f"not calibrated, {why}")

    if logits.ndim != 2 or labels.shape != (len(logits),):
        return as_trained(
            f"for logits of shape {logits.shape} and labels of {labels.shape} are not (N, classes) and (N,)"
        )
    if logits.shape[1] < 2:
        return as_trained("for there is a single class")
    if n < FEWEST:
        return as_trained(f"for {n} validation samples are too few (at least {FEWEST})")
    if not ((labels >= 0) & (labels < logits.shape[1])).all():
        return as_trained("for some labels are none of the classes")
    values = logits.astype(np.float64)
    own = values[np.arange(n), labels]
    before = _loss(values, own, 1.0)
    if not np.isfinite(before):
        return as_trained("for logits of the validation split are not finite")
    wrong, aims, note = int((values.argmax(axis=1) != labels).sum()), own, ""
    if wrong < FEWEST_WRONG:
        # Where none is wrong, likelihood only grows with confidence. Platt 1999: as if one more of n + 2 labels were.
        doubt = 1 / (n + 2)
        aims = (1 - doubt) * own + doubt * (values.sum(axis=1) - own) / (values.shape[1] - 1)
        note = f"only {wrong} of {n:,} validation samples are wrong, so it was fitted as if one more of {n + 2:,} were"
        if not np.isfinite(aims).all():
            return as_trained(f"for only {wrong} of {n:,} validation samples are wrong", before)
    found = _minimum(lambda temperature: _loss(values, aims, temperature))
    if found > BOUNDS[1] / 1.01:
        note = f"the greatest that is considered; confidence says next to nothing about the {n:,} validation samples"
    temperature = float(f"{found:.{_DIGITS}g}")
    after = _loss(values, own, temperature)
    if not after < before - _GAIN:
        return as_trained(
            "for no temperature makes the validation labels more likely" + (f" ({note})" if note else ""), before
        )
    return Calibration(parameters={TEMPERATURE: temperature}, n=n, before=before, after=after, note=note)


def _loss(logits: np.ndarray, aims: np.ndarray, temperature: float) -> float:
    """Mean negative log-likelihood; `aims` (N,) are the logits of the labels."""
    from scipy.special import logsumexp

    with np.errstate(invalid="ignore"):  # infinities, which the caller looks for
        total: np.ndarray = np.asarray(logsumexp(logits / temperature, axis=1))
        return float((total - aims / temperature).mean())


def _minimum(loss: "Callable[[float], float]") -> float:
    """Where in the bounds a loss is least; it has a single valley over the temperature's logarithm."""
    from scipy.optimize import minimize_scalar

    low, high = np.log(BOUNDS)
    found = minimize_scalar(
        lambda x: loss(float(np.exp(x))), bounds=(low, high), method="bounded", options={"xatol": 1e-8}
    )
    return float(np.exp(found.x))  # pyright: ignore[reportAttributeAccessIssue]
