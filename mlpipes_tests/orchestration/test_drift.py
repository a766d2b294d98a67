"""The drift monitor on real digits: how seldom it is wrong, what it notices, and its check in Dagster; a random champion."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest

from mlpipes.data.snapshot import Snapshot, snapshot_of
from mlpipes.definitions import build_defs
from mlpipes.evaluation.drift import DriftLimits, Figures, drift
from mlpipes.evaluation.monitor import evaluated
from mlpipes.orchestration.checks import SERVED_DRIFT
from mlpipes.serving.current import Registry, Wanted
from mlpipes.serving.model import ServedModel, fetched, load
from mlpipes.serving.sampled import folder_of
from mlpipes.serving.summaries import LABEL, summarized
from mlpipes.store.layout import Store
from mlpipes.tracking.models import SCALE, SNAPSHOT
from mlpipes.workloads.catalog import CATALOG
from mlpipes_tests.serving.fakes import keep_served
from mlpipes_tests.serving.models import NAME, champion, registered, tracker_in

SCALES = [scale.key for scale in CATALOG[0].scales]
RESAMPLES = 400
LIMITS = DriftLimits()


class Place:
    """A champion of `digits` with random weights and the real test split, in a home folder with a Dagster instance."""

    def __init__(self, home: Path) -> None:
        (home / "dagster").mkdir()
        self.home, self.store = home, Store(home / "store")
        self.instance = dg.DagsterInstance.local_temp(str(home / "dagster"))
        workload = CATALOG[0].load()
        self.snapshot: Snapshot = snapshot_of(self.store, workload.source.load().digest(), workload)[0]
        self.images = np.array(self.snapshot.columns("test")["image"])
        tracker = tracker_in(home)
        version, _ = registered(tracker, 1, more={SNAPSHOT: self.snapshot.digest, SCALE: SCALES[0]})
        champion(tracker, version)
        self.registered = Registry(lambda: tracker, Wanted(NAME), self.store).wanted_now()
        self.model: ServedModel = load(fetched(tracker, self.registered, self.store))
        self.evaluated: Figures = evaluated(self.store, tracker, self.registered)
        # Random weights say nearly the same class of all: as labels, what a trained model would say.
        labels = np.array(self.snapshot.columns("test")["label"]).astype(str)
        self.trained: Figures = self.figures(self.images) | {LABEL: labels}

    def figures(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """What is kept of images that are served."""
        return {name: np.array(each) for name, each in summarized(self.model, images, self.model(images)).items()}

    def serve(self, images: np.ndarray) -> None:
        """Answer images, as a server does that keeps of them what it keeps."""
        keep_served(self.store, self.model, images)

    def forget(self) -> None:
        """Nothing was served."""
        for path in folder_of(self.store, NAME, self.model.version, self.model.weights).glob("*"):
            path.unlink()

    def check(self, scale: str = SCALES[0]) -> Any:
        """What the check says of a partition; None where it says nothing."""
        definitions = build_defs(catalog=[CATALOG[0]])
        key = dg.AssetCheckKey(dg.AssetKey(["digits", "champion"]), SERVED_DRIFT)
        job = dg.define_asset_job("only_the_check", dg.AssetSelection.checks(key))
        whole = dg.Definitions.merge(definitions, dg.Definitions(jobs=[job]))
        result = whole.resolve_job_def("only_the_check").execute_in_process(
            instance=self.instance, tags={"dagster/partition": scale}
        )
        assert result.success
        found = result.get_asset_check_evaluations()
        return found[0] if found else None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    home = tmp_path_factory.mktemp("drift")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLPIPES_HOME", str(home))
        yield Place(home)


@pytest.fixture
def place(made: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("MLPIPES_HOME", str(made.home))  # which is cleared before each test
    made.forget()
    return made


def rows_of(figures: Figures, rows: np.ndarray) -> Figures:
    return {name: column[rows] for name, column in figures.items()}


def test_what_is_evaluated_is_the_test_split_and_is_asked_once(place: Place) -> None:
    assert {len(column) for column in place.evaluated.values()} == {len(place.images)}
    assert LABEL in place.evaluated
    again = place.figures(place.images)
    assert set(again) == set(place.evaluated)
    for name, column in again.items():
        assert sorted(column) == sorted(place.evaluated[name]), name
    (kept,) = (place.store.root / "served_evaluations" / NAME).glob("*.json")
    before = kept.stat().st_ino
    evaluated(place.store, tracker_in(place.home), place.registered)
    assert kept.stat().st_ino == before


def test_of_samples_of_the_test_split_itself_at_most_one_in_twenty_is_taken_for_drift(place: Place) -> None:
    generator, n = np.random.default_rng(0), len(place.images)
    alarms = {"drawn": 0, "halves": 0}
    for _ in range(RESAMPLES):
        drawn = drift(place.trained, rows_of(place.trained, generator.choice(n, 500)), LIMITS)
        alarms["drawn"] += bool(drawn.moved)
        mixed = generator.permutation(n)
        one, other = (rows_of(place.trained, half) for half in (mixed[: n // 2], mixed[n // 2 :]))
        alarms["halves"] += bool(drift(one, other, LIMITS).moved)
        assert len(drawn.figures) == 7, "all of these could have moved"
    print(f"false alarms of {RESAMPLES} resamples of {n} digits: {alarms}")
    assert max(alarms.values()) <= 0.05 * RESAMPLES, alarms


SHIFTS: dict[str, tuple[Callable[[np.ndarray, np.random.Generator], np.ndarray], str]] = {
    "brighter": (lambda images, _: np.clip(images.astype(int) + 2, 0, 16), "input mean"),
    "darker": (lambda images, _: images * 0.7, "input mean"),
    "noise": (
        lambda images, random: np.rint(np.clip(images + random.normal(0, 2, images.shape), 0, 16)),
        "input deviation",
    ),
    "blur": (lambda images, _: (images.astype(int) + np.roll(images, 1, -1)) // 2, "input roughness"),
}


@pytest.mark.parametrize("shift", SHIFTS)
def test_shifted_pictures_are_noticed(place: Place, shift: str) -> None:
    generator = np.random.default_rng(1)
    change, figure = SHIFTS[shift]
    for _ in range(20):
        images = place.images[generator.choice(len(place.images), 200)]
        found = drift(place.evaluated, place.figures(change(images, generator).astype(np.uint8)), LIMITS)
        assert figure in {each.name for each in found.moved}, str(found)


def test_other_shares_of_the_classes_are_noticed(place: Place) -> None:
    fives, generator = np.flatnonzero(place.trained[LABEL] == "5"), np.random.default_rng(2)
    rows = np.concatenate([generator.choice(fives, 100), generator.choice(len(place.images), 200)])
    assert LABEL in {each.name for each in drift(place.trained, rows_of(place.trained, rows), LIMITS).moved}


def test_small_differences_are_none_however_certain() -> None:
    generator = np.random.default_rng(3)
    one, other = ({"figure": generator.normal(shift, 1, 20_000)} for shift in (0, 0.1))
    (found,) = drift(one, other, LIMITS).figures
    assert found.p_value < 1e-6
    assert not found.moved
    assert drift(one, other, DriftLimits(least_effect=0.01)).moved


def test_labels_that_were_never_evaluated_are_noticed_and_rare_ones_are_taken_together() -> None:
    evaluated = {LABEL: np.array(["a"] * 150 + ["b"] * 150)}
    assert drift(evaluated, {LABEL: np.array(["a"] * 100 + ["c"] * 100)}, LIMITS).moved
    many = {LABEL: np.array([str(number) for number in range(300)])}
    assert not drift(many, {LABEL: np.array([str(number + 5) for number in range(300)])}, LIMITS).moved


def test_the_check_passes_what_looks_like_the_test_split_and_warns_of_what_does_not(place: Place) -> None:
    generator = np.random.default_rng(4)
    images = place.images[generator.choice(len(place.images), 300)]
    place.serve(images)
    good = place.check()
    assert good.passed
    metadata = {name: value.value for name, value in good.metadata.items()}
    assert (metadata["n_served"], metadata["n_evaluated"]) == (300, len(place.images))
    assert metadata["p_threshold"] == pytest.approx(0.01 / 7)
    assert metadata["moved"] == "nothing"
    assert "| input mean | 0." in metadata["figures"]

    place.forget()
    place.serve(np.clip(images.astype(int) + 2, 0, 16).astype(np.uint8))
    bad = place.check()
    assert not bad.passed
    assert bad.severity == dg.AssetCheckSeverity.WARN
    assert "input mean" in bad.metadata["moved"].value
    assert "moved: " in bad.metadata["finding"].value


def test_of_too_few_samples_or_another_scale_or_without_the_split_nothing_is_said(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = place.check()
    assert none.passed
    assert "nothing was served" in none.metadata["finding"].value
    place.serve(place.images[:99])
    few = place.check()
    assert few.passed
    assert "99 samples served" in few.metadata["finding"].value
    assert place.check(SCALES[1]) is None
    kept, snapshot = place.store.root / "served_evaluations" / NAME, place.snapshot.path
    try:
        for path in (kept, snapshot):
            path.rename(path.with_name(f"{path.name}-away"))
        gone = place.check()
    finally:
        for path in (kept, snapshot):
            path.with_name(f"{path.name}-away").rename(path)
    assert gone.passed
    assert "was evaluated on is gone" in gone.metadata["finding"].value
