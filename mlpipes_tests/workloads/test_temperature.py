"""The fit of a temperature: a known one comes back, validation never gets worse, and what cannot be fitted says why."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.special import log_softmax, softmax

from mlpipes.workloads.temperature import BOUNDS, FEWEST, fit_temperature


def sampled(n: int, classes: int, temperature: float, spread: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits float32 (N, C), and labels that are drawn by their probabilities at a temperature."""
    generator = np.random.default_rng(0)
    logits = (spread * temperature * generator.normal(size=(n, classes))).astype(np.float32)
    chances = softmax(logits.astype(np.float64) / temperature, axis=1).cumsum(axis=1)
    return logits, (generator.random((n, 1)) > chances).sum(axis=1).clip(max=classes - 1)


def loss(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Mean negative log-likelihood, written otherwise than in the fit."""
    return float(-log_softmax(logits.astype(np.float64) / temperature, axis=1)[np.arange(len(labels)), labels].mean())


@pytest.mark.parametrize("temperature", [0.2, 0.8, 1.5, 6.0])
@pytest.mark.parametrize("classes", [2, 10])
def test_a_known_temperature_comes_back(temperature: float, classes: int) -> None:
    logits, labels = sampled(20_000, classes, temperature)
    found = fit_temperature(logits, labels)
    assert found.parameters["temperature"] == pytest.approx(temperature, rel=0.03)
    assert (found.n, found.note) == (20_000, "")
    assert found == fit_temperature(logits, labels)


def test_it_is_the_least_loss_of_all_temperatures() -> None:
    logits, labels = sampled(500, 5, 3.0)
    found = fit_temperature(logits, labels)
    best = min(np.geomspace(*BOUNDS, 4001), key=lambda temperature: loss(logits, labels, temperature))
    assert found.parameters["temperature"] == pytest.approx(best, rel=0.003)
    assert found.before == pytest.approx(loss(logits, labels, 1.0))
    assert found.after == pytest.approx(loss(logits, labels, found.parameters["temperature"]))


def test_where_none_is_wrong_it_stays_as_sure_as_so_few_samples_let_one_be() -> None:
    labels = np.arange(180) % 10
    logits = 3 * np.eye(10)[labels] + np.random.default_rng(0).normal(scale=0.2, size=(180, 10))
    found = fit_temperature(logits, labels)
    assert found.note == "only 0 of 180 validation samples are wrong, so it was fitted as if one more of 182 were"
    confidence = softmax(logits / found.parameters["temperature"], axis=1).max(axis=1).mean()
    assert confidence == pytest.approx(1 - 1 / 182, abs=0.002)
    # Sure of what it cannot know already: more doubt would make the labels that are there less likely.
    sure = fit_temperature(20 * logits, labels)
    assert sure.parameters == {}
    assert sure.note.startswith("not calibrated, for no temperature makes the validation labels more likely (only 0 of")


def test_confidence_that_says_nothing_is_all_but_taken_away() -> None:
    generator = np.random.default_rng(0)
    logits, labels = 50 * generator.normal(size=(400, 4)), generator.integers(0, 4, 400)
    labels = np.where(labels == logits.argmax(axis=1), (labels + 1) % 4, labels)  # worse than chance
    found = fit_temperature(logits, labels)
    assert found.parameters["temperature"] > 0.98 * BOUNDS[1]
    assert "says next to nothing about the 400 validation samples" in found.note


WELL = sampled(60, 3, 2.0)


@pytest.mark.parametrize(
    ("logits", "labels", "said"),
    [
        (np.zeros((60, 1)), np.zeros(60, dtype=int), "a single class"),
        (WELL[0][: FEWEST - 1], WELL[1][: FEWEST - 1], "29 validation samples are too few"),
        (WELL[0][:0], WELL[1][:0], "0 validation samples are too few"),
        (np.where(np.arange(60)[:, None] == 3, np.nan, WELL[0]), WELL[1], "are not finite"),
        (np.where(np.arange(60)[:, None] == 3, np.inf, WELL[0]), WELL[1], "are not finite"),
        (np.where(np.eye(3)[WELL[1]] > 0, -np.inf, WELL[0]), WELL[1], "are not finite"),
        (np.zeros((60, 3)), WELL[1], "no temperature makes the validation labels more likely"),
        (np.zeros((60, 3, 2)), WELL[1], r"logits of shape \(60, 3, 2\)"),
        (WELL[0], WELL[1][:, None], r"labels of \(60, 1\)"),
        (WELL[0], WELL[1] - 1, "some labels are none of the classes"),
        (np.where(np.eye(3)[WELL[1]] > 0, 1.0, -np.inf), WELL[1], "for only 0 of 60 validation samples are wrong"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_cannot_be_fitted_is_left_as_trained_and_says_why(
    logits: np.ndarray, labels: np.ndarray, said: str
) -> None:
    found = fit_temperature(logits, labels)
    assert (found.parameters, found.after, found.n) == ({}, None, len(labels))
    assert found.note.startswith("not calibrated, for ")
    assert re.search(said, found.note), found.note


def test_a_class_that_is_ruled_out_does_no_harm() -> None:
    logits, labels = sampled(2000, 4, 2.0)
    labels = np.where(labels == 3, 0, labels)
    logits[:, 3] = -np.inf
    assert 0.5 < fit_temperature(logits, labels).parameters["temperature"] < 20


@settings(deadline=None, max_examples=150)
@given(
    arrays.arrays(np.float32, (40, 3), elements=st.floats(-100, 100, width=32)),
    arrays.arrays(np.int64, 40, elements=st.integers(0, 2)),
)
def test_validation_never_gets_worse_and_no_answer_changes(logits: np.ndarray, labels: np.ndarray) -> None:
    found = fit_temperature(logits, labels)
    temperature = found.parameters.get("temperature", 1.0)
    assert BOUNDS[0] <= temperature <= BOUNDS[1]
    if found.parameters:
        assert found.after is not None
        assert found.before is not None
        assert found.after < found.before
        exact = logits.astype(np.float64)
        assert (exact.argmax(axis=1) == (exact / temperature).argmax(axis=1)).all()
