"""Comparisons by hand and against chance: the test must find what is there, and rarely what is not."""

import numpy as np
import pytest

from mlpipes.reporting.report import Estimate
from mlpipes.reporting.statistics import paired, unpaired


def test_right_and_wrong_by_hand() -> None:
    first = np.array([1, 1, 1, 1, 1, 1, 0, 0, 0, 0], dtype=np.float32)
    second = np.array([1, 1, 0, 0, 0, 0, 0, 0, 0, 1], dtype=np.float32)
    found = paired(first, second)
    assert found.value == pytest.approx(-0.3)
    # Four lost, one won: the two-sided binomial probability of one or fewer of five, 2 · (1 + 5) / 32.
    assert found.p_value == pytest.approx(12 / 32)
    assert found.low < -0.3 < found.high
    assert not found.is_worse(0.05)
    assert paired(first, first).p_value == 1


def test_errors_by_hand() -> None:
    generator = np.random.default_rng(0)
    first = generator.normal(0, 1, 400)
    worse = paired(first, first - 0.1 - generator.normal(0, 0.1, 400))
    assert worse.is_worse(0.01)
    assert worse.low < -0.1 < worse.high
    assert paired(first, first + 1.0).value == pytest.approx(1)
    assert paired(first, first).p_value == 1


def test_of_equal_models_few_look_worse_and_the_interval_covers() -> None:
    generator = np.random.default_rng(1)
    alarms, covered, trials = 0, 0, 400
    for _ in range(trials):
        hard = generator.random(300) < 0.1
        first, second = ((generator.random(300) > np.where(hard, 0.5, 0.01)).astype(np.float32) for _ in range(2))
        found = paired(first, second)
        alarms += found.is_worse(0.05)
        covered += found.low <= 0 <= found.high
    assert alarms / trials <= 0.05
    assert covered / trials >= 0.93


def test_other_samples_are_refused_and_intervals_add_up() -> None:
    with pytest.raises(ValueError, match="not of the same samples"):
        paired(np.zeros(3), np.zeros(4))
    found = unpaired(Estimate(0.80, 0.76, 0.83, 400), Estimate(0.90, 0.87, 0.92, 500))
    assert found.value == pytest.approx(0.1)
    assert found.low == pytest.approx(0.1 - np.hypot(0.03, 0.03))
    assert found.high == pytest.approx(0.1 + np.hypot(0.02, 0.04))
    assert found.n == 400
