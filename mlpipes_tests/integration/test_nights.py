"""A week of nightly evaluations with one bad model in it: the gate holds, the champion stays, the report shows it."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from mlpipes.definitions import build_defs
from mlpipes.evaluation.compare import compare, evaluation_named
from mlpipes.evaluation.records import evaluations_of
from mlpipes.scales import scales_of
from mlpipes.scaling.report import Prices, make_report
from mlpipes.store.layout import Store
from mlpipes.tracking.champion import Champions
from mlpipes.tracking.runs import Tracker, default_uri
from mlpipes.workloads.catalog import CATALOG, Entry

SCALE, OTHER = "w1-b128-e4-g0", "w1-b128-e5-g0"
FIRST = datetime(2026, 11, 1, 2, tzinfo=UTC)
NIGHTS, BAD_NIGHT = 7, 3


@pytest.fixture
def home(ray_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLPIPES_HOME", str(ray_home))
    return ray_home


class Desk:
    """One workload of two scales, in a Dagster instance of its own."""

    def __init__(self, home: Path) -> None:
        self.entry = Entry("nights", "Digits", CATALOG[0].implementation, scales_of([SCALE, OTHER], "test"))
        self.definitions, self.store = build_defs(catalog=[self.entry]), Store(home / "store")
        (home / "nights").mkdir()
        self.instance = dg.DagsterInstance.local_temp(str(home / "nights"))

    def launch(self, job: str, config: Any = None, tags: dict[str, str] | None = None) -> Any:
        return self.definitions.resolve_job_def(job).execute_in_process(
            instance=self.instance, partition_key=SCALE, run_config=config, tags=tags, raise_on_error=False
        )

    def tick(self, night: datetime) -> list[dg.RunRequest]:
        """What the schedule asks for on a night."""
        schedule = self.definitions.resolve_schedule_def("nights_nightly")
        repository = self.definitions.get_repository_def()
        with dg.build_schedule_context(
            instance=self.instance, scheduled_execution_time=night, repository_def=repository
        ) as context:
            return list(schedule.evaluate_tick(context).run_requests or [])

    def champion(self) -> Any:
        return Champions(Tracker(default_uri()), "mlpipes-nights").current()


def training(**hyperparameters: Any) -> dict[str, Any]:
    return {"ops": {"nights__checkpoints": {"config": {"hyperparameters": hyperparameters}}}}


@pytest.mark.long
def test_a_week_with_one_bad_model(home: Path) -> None:
    desk = Desk(home)
    assert desk.tick(FIRST) == []  # nothing is trained: skipped, with a reason
    assert desk.launch("nights_chain").success
    champion = desk.champion()
    assert champion is not None
    for number in range(NIGHTS):
        night = FIRST + timedelta(days=number)
        if number == BAD_NIGHT:
            # Somebody trains with next to no learning rate. The run fails at the gate, and promotes nothing.
            nothing = {"learning_rate": 1e-7, "head_learning_rate": 1e-7, "bias_learning_rate": 1e-7}
            bad = desk.launch("nights_chain", training(**nothing))
            assert not bad.success
            assert desk.champion() == champion
        elif number == BAD_NIGHT + 1:
            assert desk.launch("nights_chain").success  # the good one again: found by its fingerprint
        requests = desk.tick(night)
        # Only the scale that has a model.
        assert [(r.run_key, r.partition_key) for r in requests] == [(f"nights:{night:%Y-%m-%d}:{SCALE}", SCALE)]
        result = desk.launch("nights_evaluation", tags=dict(requests[0].tags))
        assert result.success == (number != BAD_NIGHT), night
        assert desk.tick(night) == [], "a night is judged once"
        assert desk.champion() == champion, "the bad model must not take the alias, and the good one keeps it"

    nights = [e for e in evaluations_of(desk.store, "nights", SCALE) if e.meta.night]
    assert [e.meta.night for e in nights] == [f"2026-11-{day:02d}" for day in range(1, NIGHTS + 1)]
    assert [e.is_good for e in nights] == [number != BAD_NIGHT for number in range(NIGHTS)]
    verdict = nights[BAD_NIGHT].verdict
    assert verdict is not None
    assert not verdict["gates"]["regression"]["passed"]
    assert "against the last good one" in verdict["gates"]["regression"]["text"]

    bad = evaluation_named(desk.store, [desk.entry], f"nights/{SCALE}@{nights[BAD_NIGHT].meta.fingerprint[:12]}")
    assert bad.name == nights[BAD_NIGHT].name
    comparison = compare(desk.store, nights[0], bad, "accuracy")
    assert comparison.differences["recipe.hyperparameters.learning_rate"] == (0.02, 1e-7)
    assert not [name for name in comparison.differences if name.startswith(("data", "environment"))]
    assert comparison.metrics["score per sample"][2].is_worse(0.001)
    assert compare(desk.store, nights[0], nights[-1], "accuracy").differences == {}

    report = make_report(desk.store, desk.entry, Prices())
    assert report.nights is not None
    assert len(report.nights.rows) == NIGHTS
    bad_row = report.nights.rows[BAD_NIGHT]
    assert bad_row[0] == "2026-11-04"
    assert "HELD by floor, regression" in bad_row[1]
    assert sum("HELD" in row[1] for row in report.nights.rows) == 1
    text, _ = report.write(desk.store, desk.entry)
    assert "| 2026-11-04 |" in text
    assert f"{OTHER} (never trained)" in text
