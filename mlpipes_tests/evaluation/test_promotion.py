"""Promotion: which figures decide whether the champion is beaten, by the rows that both models met."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpipes.evaluation.promotion import decide
from mlpipes.evaluation.records import Evaluation, Subject, publish_evaluation
from mlpipes.reporting.classification import wilson
from mlpipes.reporting.metric import Metric
from mlpipes.reporting.report import Report
from mlpipes.store.files import publishing
from mlpipes.store.layout import Store
from mlpipes.tracking.champion import Version
from mlpipes.training.model import KIND, VERSION

SCALE, N = "w1-b8-e1-g0", 400


class Accuracy:
    """As much of a workload as promotion needs."""

    metric = Metric("accuracy")

    def selection_key(self, metrics: dict[str, float]) -> tuple[float, ...]:
        return metrics["accuracy"], -metrics["loss"]


class Desk:
    """Models with an evaluation each."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root)

    def model(
        self, name: str, accuracy: float | None, right: int, *, snapshot: str = "s", **rows: str
    ) -> tuple[Evaluation, Version]:
        """One with a validation accuracy (None: it had another metric) and so many of N test samples right."""
        folder = self.store.training(name * 64)
        metrics = {"loss": 1.0} | ({"error": 0.5} if accuracy is None else {"accuracy": accuracy})
        with publishing(folder.model, kind=KIND, version=VERSION) as draft:
            draft.meta["metrics"] = metrics
        subject = Subject(
            workload="w", scale=SCALE, seed=0, fingerprint=folder.fingerprint, snapshot=snapshot,
            rows={"test": "t", "validation": "v"} | rows, weights=name * 64, split="test", n=N,
            data="made up", night=None, dagster_run_id=name * 8,
        )  # fmt: skip
        scores = (np.arange(N) < right).astype(np.float32)
        evaluation = publish_evaluation(folder, Report({"accuracy": wilson(right, N)}), scores, "title", subject)
        return evaluation, Version(name, folder.fingerprint, SCALE, snapshot, None)

    def decided(self, candidate: tuple[Evaluation, Any], champion: Version | None) -> tuple[bool, str]:
        workload: Any = Accuracy()
        decision = decide(self.store, workload, candidate[0], champion)
        return decision.promoted, decision.reason


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_the_first_one_is_promoted(desk: Desk) -> None:
    assert desk.decided(desk.model("a", 0.9, 380), None) == (
        True,
        "the first to pass the gates; validation accuracy 0.9000",
    )


@pytest.mark.parametrize("snapshot", ["s", "another"])
def test_validated_on_the_same_rows_the_better_one_by_validation_wins(desk: Desk, snapshot: str) -> None:
    """Whatever the snapshot's digest, and whatever test says: the choice must not see it."""
    _, champion = desk.model("a", 0.9, 380)
    better, worse = desk.model("b", 0.91, 330, snapshot=snapshot), desk.model("c", 0.9, 395, snapshot=snapshot)
    assert desk.decided(better, champion) == (True, f"validation accuracy 0.9100 against 0.9000 of version a ({SCALE})")
    promoted, reason = desk.decided(worse, champion)
    assert not promoted
    assert reason.endswith("not better, the champion stays")


def test_tested_on_other_rows_is_newer_data(desk: Desk) -> None:
    _, champion = desk.model("a", 0.9, 380)
    promoted, reason = desk.decided(desk.model("b", 0.8, 330, snapshot="another", test="u"), champion)
    assert promoted
    assert "newer data" in reason


@pytest.mark.parametrize(("right", "promoted"), [(300, False), (381, False), (395, True)])
def test_validated_on_other_rows_it_must_do_the_test_rows_better_than_chance_explains(
    desk: Desk, right: int, promoted: bool
) -> None:
    _, champion = desk.model("a", 0.9, 380)
    candidate = desk.model("b", 0.99, right, snapshot="another", validation="w")
    found, reason = desk.decided(candidate, champion)
    assert found is promoted
    assert "same test samples" in reason


def test_a_champion_that_a_person_chose_stays_and_is_named(desk: Desk) -> None:
    _, champion = desk.model("a", 0.5, 200)
    held = replace(champion, by_hand="by hand: I like it")
    promoted, reason = desk.decided(desk.model("b", 0.99, 390), held)
    assert not promoted
    assert f"version a ({SCALE})" in reason
    assert "by hand: I like it" in reason
    assert "mlpipes release" in reason


def test_the_champions_own_weights_exported_anew_take_its_place(desk: Desk) -> None:
    candidate = desk.model("a", 0.9, 380)
    before = replace(candidate[1], version="1")
    assert desk.decided(candidate, before) == (
        True,
        f"the weights of version 1 ({SCALE}), exported anew; validation accuracy 0.9000",
    )
    assert not desk.decided(candidate, replace(before, by_hand="by hand: I like it"))[0]


def test_a_champion_of_another_metric_is_compared_on_test(desk: Desk) -> None:
    _, champion = desk.model("a", None, 380)
    assert not desk.decided(desk.model("b", 0.99, 381), champion)[0]
    assert desk.decided(desk.model("c", 0.99, 395), champion)[0]


def test_a_champion_of_which_nothing_is_left_cannot_stay(desk: Desk) -> None:
    promoted, reason = desk.decided(desk.model("b", 0.8, 330), Version("7", "f" * 64, SCALE, "gone", None))
    assert promoted
    assert "nothing is left" in reason


def test_a_champion_without_an_evaluation_on_the_same_snapshot_is_compared_by_validation(desk: Desk) -> None:
    """As one that was promoted by hand, with --force."""
    evaluation, champion = desk.model("a", 0.9, 380)
    shutil.rmtree(evaluation.path)
    assert not desk.decided(desk.model("b", 0.8, 395), champion)[0]
    assert desk.decided(desk.model("c", 0.95, 330), champion)[0]
