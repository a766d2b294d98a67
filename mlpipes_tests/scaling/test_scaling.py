"""Scaling: figures by hand, the law on data with known parameters, and which scale is recommended."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlpipes.reporting.figures import png_of
from mlpipes.reporting.metric import Metric
from mlpipes.reporting.report import Estimate
from mlpipes.scales import RayScaleConfig
from mlpipes.scaling import figure
from mlpipes.scaling.law import fit_scaling_law
from mlpipes.scaling.table import Prices, ScaleResult, cost_table, forecast_table, laws_of, recommend, scaling_rows
from mlpipes.store.outcome import Usage


def result(key: str, speed: float, comparable: str = "same", value: float = 0.9, seconds: float = 10.0) -> ScaleResult:
    test = Estimate(value, value - 0.1, value + 0.05, 100)
    usage = Usage(cpu_seconds_per_second=1.5, peak_memory_bytes=2**30, peak_gpu_memory_bytes=0, gpu_utilisation=0.5)
    return ScaleResult(
        RayScaleConfig.from_key(key), "s", "c", value, test, seconds, speed, "w" * 64, comparable, 3600, usage
    )


def test_speed_up_and_efficiency_by_hand() -> None:
    rows = scaling_rows(
        [result("w2-b8-e1-g0", 150.0), result("w1-b8-e1-g0", 100.0), result("w4-b8-e1-g0", 200.0, "other")]
    )
    assert [row["baseline"] for row in rows] == ["w1-b8-e1-g0", "w1-b8-e1-g0", None]
    assert [row["speed_up"] for row in rows] == [1.5, 1.0, None]
    assert [row["efficiency"] for row in rows] == [0.75, 1.0, None]


def test_cost_and_pareto_front_by_hand() -> None:
    results = [
        result("w1-b8-e1-g0", 100.0, seconds=3600, value=0.90),  # 1 CPU-hour
        result("w2-b8-e1-g0", 150.0, seconds=2400, value=0.90),  # 4/3 CPU-hours, no better
        result("w4-b8-e1-g0-c0.5", 150.0, seconds=3600, value=0.95),  # 2 CPU-hours, better
        result("w2-b8-e1-g1", 900.0, seconds=1800, value=0.80),  # 1 GPU-hour
    ]
    rows = scaling_rows(results, Prices(gpu_hour=3.0, cpu_hour=0.5))
    assert [row["device_hours"] for row in rows] == pytest.approx([1, 4 / 3, 2, 1])
    assert [row["cost"] for row in rows] == pytest.approx([0.5, 2 / 3, 1, 3])
    assert [row["pareto"] for row in rows] == [True, False, True, False]
    assert rows[1]["cpu_utilisation"] == pytest.approx(0.75)
    assert rows[1]["gpu_utilisation"] == 0.5
    assert "1,024" in cost_table(rows).markdown()
    assert all(row["cost"] is None for row in scaling_rows(results))


def test_figures_of_other_data_do_not_push_a_scale_off_the_front() -> None:
    old = ScaleResult(**{**result("w1-b8-e1-g0", 1.0, value=0.99).__dict__, "snapshot": "older"})
    rows = scaling_rows([old, result("w2-b8-e1-g0", 1.0, value=0.5)])
    assert [row["pareto"] for row in rows] == [True, True]


def throughput(workers: list[int], contention: float, coherency: float, noise: float, seed: int) -> list[float]:
    generator = np.random.default_rng(seed)
    n = np.array(workers)
    exact = 100 * n / (1 + contention * (n - 1) + coherency * n * (n - 1))
    return (exact * np.exp(generator.normal(0, noise, len(n)))).tolist()


@pytest.mark.parametrize(("contention", "coherency"), [(0.1, 0.0), (0.3, 0.0), (0.05, 0.01)])
def test_the_law_finds_known_parameters(contention: float, coherency: float) -> None:
    workers = [1, 2, 4, 8, 16]
    law = fit_scaling_law(workers, throughput(workers, contention, coherency, 1e-6, 0))
    assert law is not None
    assert law.single == pytest.approx(100, rel=1e-4)
    assert law.contention == pytest.approx(contention, rel=1e-3)
    assert law.coherency == pytest.approx(coherency, rel=1e-2)
    assert law.name == ("universal scalability law" if coherency else "Amdahl's law")


@pytest.mark.parametrize("workers", [[1, 2, 4], [1, 2, 4, 8, 16]])
def test_intervals_of_law_and_forecast_cover_as_often_as_they_say(workers: list[int]) -> None:
    trials, parameter, forecast = 200, 0, 0
    for seed in range(trials):
        *measured, truth = throughput([*workers, 32], 0.1, 0.0, 0.03, seed)
        law = fit_scaling_law(workers, measured)
        assert law is not None
        low, high = law.interval(1)
        parameter += low <= 0.1 <= high
        point = law.forecast(32)
        forecast += point.low <= truth <= point.high
    # 95 % nominal; of 200 trials, 89 % or fewer would be chance once in ten thousand.
    assert parameter / trials > 0.89
    assert forecast / trials > 0.89


def test_two_scales_are_too_few_for_a_law() -> None:
    assert fit_scaling_law([1, 2, 2], [100, 190, 180]) is None


def test_forecasts_are_for_scales_of_the_same_shape_and_drawn() -> None:
    results = [result(f"w{n}-b64-e1-g0", 100 * n / (1 + 0.1 * (n - 1))) for n in (1, 2, 4)]
    not_run = [RayScaleConfig.from_key(key) for key in ("w16-b64-e1-g0", "w8-b32-e1-g0")]
    (law,) = laws_of(results, not_run, Prices(cpu_hour=1.0))
    assert [row["scale"] for row in law.forecasts] == ["w16-b64-e1-g0", "w8-b64-e1-g0"]
    assert law.forecasts[1]["samples_per_second"] == pytest.approx(800 / 1.7, rel=1e-3)
    assert law.forecasts[1]["train_seconds"] == pytest.approx(3600 * 1.7 / 800, rel=1e-3)
    assert law.forecasts[1]["cost"] == pytest.approx(8 * 3600 * 1.7 / 800 / 3600, rel=1e-3)
    assert "w8-b64-e1-g0" in forecast_table(law).markdown()
    assert figure.scaling(scaling_rows(results), [law], "accuracy").startswith(b"\x89PNG")


def test_what_says_nothing_is_not_shown_as_a_law() -> None:
    """As three scales on two busy cores came out once: anything from 400 to 126,011 samples/s, 0 to 100 % parallel."""
    noisy = [result(f"w{n}-b64-e1-g0", speed) for n, speed in ((1, 4000.0), (2, 4700.0), (4, 3900.0))]
    (law,) = laws_of(noisy, [])
    assert law.forecasts
    assert not law.says_something()
    assert law.markdown() == (
        "Not enough to tell how throughput grows with workers, from w1-b64-e1-g0, w2-b64-e1-g0, w4-b64-e1-g0: run more "
        "scales."
    )
    assert figure.scaling(scaling_rows(noisy), [law], "accuracy").startswith(b"\x89PNG")
    (clear,) = laws_of([result(f"w{n}-b64-e1-g0", 100 * n / (1 + 0.1 * (n - 1))) for n in (1, 2, 4)], [])
    assert "10.0% of the work is not parallel" in clear.markdown()
    assert "w8-b64-e1-g0" in clear.markdown()


def test_where_lower_is_better_the_lowest_is_recommended_and_on_the_front() -> None:
    error = Metric("root_mean_squared_error", higher_is_better=False)
    found = [
        replace(result(key, 1, value=value, seconds=seconds), metric=error)
        for key, value, seconds in (("w1-b8-e1-g0", 2.0, 1000), ("w2-b8-e1-g0", 1.0, 2000), ("w4-b8-e1-g0", 1.5, 4000))
    ]
    rows = scaling_rows(found)
    assert recommend(rows)[0] == rows[1]
    assert [row["pareto"] for row in rows] == [True, True, False]
    assert str(error) == "root_mean_squared_error (lower is better)"


def test_the_recommended_scale_keeps_its_limits() -> None:
    rows = scaling_rows(
        [
            result("w1-b8-e1-g0", 1, value=0.95, seconds=7200),
            result("w2-b8-e1-g0", 2, value=0.95, seconds=4000),
            result("w4-b8-e1-g0", 4, value=0.80, seconds=600),
        ],
        Prices(cpu_hour=1.0),
    )

    def chosen(**limits: float) -> str:
        row, _ = recommend(rows, **limits)
        return "none" if row is None else row["scale"]

    assert chosen() == "w1-b8-e1-g0"  # as good as w2, and cheaper
    assert chosen(deadline_seconds=5000) == "w2-b8-e1-g0"
    assert chosen(budget=1.0) == "w4-b8-e1-g0"
    assert chosen(deadline_seconds=1) == "none"
    assert "needs a price" in recommend(scaling_rows([result("w1-b8-e1-g0", 1)]), budget=1.0)[1]


def test_titles_do_not_overlap_however_long_the_metrics_name(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figure, "png_of", lambda it: drawn.append(it) or png_of(it))
    results = [result(f"w{workers}-b8-e1-g0", 100.0) for workers in (1, 2)]
    figure.scaling(scaling_rows(results), [], "root_mean_squared_error (lower is better)")
    boxes = [axes.title.get_window_extent() for axes in drawn[0].axes]
    assert len(boxes) == 6
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
