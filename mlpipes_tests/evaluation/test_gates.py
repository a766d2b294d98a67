"""Gates: what they let pass, what they hold, what they remember; and evaluations in the store."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlpipes.errors import ConfigError, CorruptionError
from mlpipes.evaluation.gates import Limits, pass_through
from mlpipes.evaluation.records import Evaluation, Subject, evaluations_of, open_evaluation, publish_evaluation
from mlpipes.reporting.classification import wilson
from mlpipes.reporting.metric import Metric
from mlpipes.reporting.report import Report
from mlpipes.store.layout import Store
from mlpipes.store.references import EvaluationReference
from mlpipes_tests.conftest import tiny_dataset
from mlpipes_tests.data.test_snapshot import make

N = 400
ACCURACY, ERROR = Metric("accuracy"), Metric("error", higher_is_better=False)


class Partition:
    """Evaluations of one partition, one after the other."""

    def __init__(self, root: Path) -> None:
        self.store, self.count, self.metric = Store(root), 0, ACCURACY

    def evaluate(
        self,
        right: int,
        *,
        snapshot: str = "s",
        rows: str | None = None,
        shift: int = 0,
        ece: float = 0.02,
        baseline: float | None = 0.5,
    ) -> Evaluation:
        """An evaluation in which `right` of N samples are right, beginning with number `shift`."""
        self.count += 1
        scores = np.roll((np.arange(N) < right).astype(np.float32), shift)
        quantities = {"expected_calibration_error": ece} | ({} if baseline is None else {"baseline": baseline})
        report = Report({"accuracy": wilson(right, N), "error": wilson(N - right, N)}, quantities=quantities)
        subject = Subject(
            workload="w", scale="w1-b8-e1-g0", seed=0, fingerprint="f" * 64, snapshot=snapshot,
            weights=f"{self.count:064d}", split="test", n=N, data="made up", night=None,
            rows={} if rows is None else {"test": rows}, dagster_run_id=f"{self.count:08d}",
        )  # fmt: skip
        return publish_evaluation(self.store.training("f" * 64), report, scores, "title", subject)

    def judge(self, current: Evaluation, **limits: float) -> dict[str, bool]:
        before = [e for e in evaluations_of(self.store, "w", "w1-b8-e1-g0") if e.name < current.name]
        found = pass_through(current, before, self.metric, Limits(**limits))
        return {name: finding.passed for name, finding in found.items()}


@pytest.fixture
def partition(tmp_path: Path) -> Partition:
    return Partition(tmp_path)


ALL = {"floor": True, "regression": True, "calibration": True, "drift": True}


def test_a_first_good_model_passes(partition: Partition) -> None:
    first = partition.evaluate(380)
    assert not first.is_good
    assert partition.judge(first) == ALL
    assert first.is_good


def test_no_better_than_guessing_does_not_pass(partition: Partition) -> None:
    found = partition.judge(partition.evaluate(215))  # 53.8 %, but its interval reaches below 50 %
    assert not found["floor"]
    assert partition.judge(partition.evaluate(300), floor=0.8)["floor"] is False
    assert partition.judge(partition.evaluate(330), floor=0.8)["floor"] is True


def test_where_lower_is_better_the_floor_is_a_ceiling_and_the_baseline_lies_above(partition: Partition) -> None:
    """Errors of N samples; who guesses blindly has half of them wrong."""
    partition.metric = ERROR
    assert partition.judge(partition.evaluate(380)) == ALL, "20 wrong"
    assert not partition.judge(partition.evaluate(185))["floor"], "53.8 % wrong, but its interval reaches above 50 %"
    assert partition.judge(partition.evaluate(330), floor=0.2)["floor"] is True
    assert partition.judge(partition.evaluate(300), floor=0.2)["floor"] is False
    current = partition.evaluate(300)
    text = pass_through(current, [], ERROR, Limits(floor=0.2), only=["floor"])["floor"].text
    assert "ceiling 0.2" in text


def test_drift_compares_with_the_lowest_error(partition: Partition) -> None:
    partition.metric = ERROR
    for right in (380, 340, 341):
        current = partition.evaluate(right)
        current.record({"passed": True, "gates": {}})
    found = pass_through(
        partition.evaluate(341), evaluations_of(partition.store, "w", "w1-b8-e1-g0"), ERROR, Limits(), only=["drift"]
    )
    assert not found["drift"].passed, "not worse than the last ones, but than the best"


def test_without_a_baseline_nothing_is_judged(partition: Partition) -> None:
    current = partition.evaluate(10, baseline=None)
    found = pass_through(current, [], ACCURACY, Limits(), only=["floor"])["floor"]
    assert found.passed
    assert "not compared" in found.text


def test_a_worse_model_is_held_and_the_next_is_compared_with_the_last_good_one(partition: Partition) -> None:
    partition.judge(partition.evaluate(380))
    bad = partition.evaluate(340)
    assert partition.judge(bad) == ALL | {"regression": False, "drift": False}
    assert not bad.is_good
    # As bad as the bad one: compared with the good one before it, so held as well.
    assert not partition.judge(partition.evaluate(340))["regression"]
    assert partition.judge(partition.evaluate(379)) == ALL


def test_a_slow_decline_passes_each_night_and_is_noticed_as_drift(partition: Partition) -> None:
    drifted = []
    for right in (390, 386, 382, 378, 374, 370):
        found = partition.judge(partition.evaluate(right))
        assert found["regression"], right
        drifted.append(found["drift"])
    assert drifted[:2] == [True, True]
    assert drifted[-1] is False


def test_other_data_are_not_compared(partition: Partition) -> None:
    partition.judge(partition.evaluate(390))
    assert partition.judge(partition.evaluate(300, snapshot="t")) == ALL


def test_a_new_snapshot_of_the_same_test_samples_is_compared(partition: Partition) -> None:
    """Other statistics, tokens or training rows change the snapshot's digest, and hide no regression."""
    partition.judge(partition.evaluate(390, snapshot="s", rows="r"))
    worse = partition.evaluate(300, snapshot="t", rows="r")
    assert partition.judge(worse) == ALL | {"regression": False, "drift": False}
    assert partition.judge(partition.evaluate(300, snapshot="u", rows="q")) == ALL, "other samples, new data"


def test_data_that_come_back_are_compared_with_what_was_good_on_them(partition: Partition) -> None:
    partition.judge(partition.evaluate(390, snapshot="s", rows="r"))
    partition.judge(partition.evaluate(300, snapshot="t", rows="q"))
    assert not partition.judge(partition.evaluate(301, snapshot="s", rows="r"))["regression"]


def test_an_evaluation_without_rows_takes_them_from_its_snapshot(tmp_path: Path) -> None:
    """Evaluations of before they were noted; where the snapshot is gone too, only its digest is left to compare."""
    partition, shapes = Partition(tmp_path), [tiny_dataset(), tiny_dataset()]
    shapes[1] = replace(shapes[1], facts=dict(shapes[1].facts) | {"note": "another digest"})
    snapshots = [make(partition.store.root, dataset) for dataset in shapes]
    assert snapshots[0].digest != snapshots[1].digest
    assert snapshots[0].rows("test") == snapshots[1].rows("test")
    partition.judge(partition.evaluate(390, snapshot=snapshots[0].digest))
    worse = partition.evaluate(300, snapshot=snapshots[1].digest, rows=snapshots[1].rows("test"))
    assert not partition.judge(worse)["regression"]
    assert partition.judge(partition.evaluate(300, snapshot="gone", rows=snapshots[1].rows("validation"))) == ALL


def test_bad_calibration_warns_and_does_not_hold(partition: Partition) -> None:
    found = partition.evaluate(380, ece=0.3)
    assert partition.judge(found) == ALL | {"calibration": False}
    assert found.is_good


def test_half_a_verdict_lets_nothing_pass(partition: Partition) -> None:
    found = partition.evaluate(380)
    pass_through(found, [], ACCURACY, Limits(), only=["floor"])
    assert not found.is_good
    pass_through(found, [], ACCURACY, Limits(), only=["regression"])
    assert found.is_good


def test_changed_scores_are_noticed(partition: Partition) -> None:
    found = partition.evaluate(380)
    path = found.path / "scores.npy"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptionError, match=r"scores\.npy does not match"):
        found.scores()
    gone = EvaluationReference(
        fingerprint="0" * 64, mlflow_run_id="r", snapshot="s", registered_model="m", version="1", evaluation="gone",
        estimates={},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="materialize `eval_report` again"):
        open_evaluation(partition.store, gone)
