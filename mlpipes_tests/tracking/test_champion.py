"""The champion's alias: given with a reason, given back, and never to one that lost it before."""

from pathlib import Path

import pytest

from mlpipes.errors import ConfigError
from mlpipes.tracking.champion import REASON, Champions
from mlpipes.tracking.models import FINGERPRINT, SCALE, SNAPSHOT
from mlpipes.tracking.runs import Tracker, default_uri
from mlpipes_tests import prepared


@pytest.fixture
def champions(isolated_home: Path) -> Champions:
    """A registered model with versions 1, 2 and 3 of two scales."""
    prepared.mlflow_store(isolated_home / "mlflow" / "mlflow.db")
    tracker = Tracker(default_uri())
    tracker.client.create_registered_model("mlpipes-w")
    for number, scale in enumerate(("w1-b8-e1-g0", "w2-b8-e1-g0", "w1-b8-e1-g0"), start=1):
        tags = {FINGERPRINT: f"{number}" * 64, SCALE: scale, SNAPSHOT: "s"}
        tracker.client.create_model_version("mlpipes-w", f"file:///nowhere/{number}", tags=tags)
    return Champions(tracker, "mlpipes-w")


def test_promotion_is_recorded_with_its_reason(champions: Champions) -> None:
    assert champions.current() is None
    assert Champions(Tracker(default_uri()), "unknown").current() is None
    champions.promote("1", "the first")
    current = champions.current()
    assert current is not None
    assert (current.version, current.scale, current.fingerprint) == ("1", "w1-b8-e1-g0", "1" * 64)
    assert (current.reason or "").endswith("UTC: the first")
    assert champions.client.get_model_version("mlpipes-w", "1").tags[REASON] == current.reason


def test_the_latest_version_of_a_scale_is_found(champions: Champions) -> None:
    assert champions.of_scale("w1-b8-e1-g0").version == "3"
    with pytest.raises(ConfigError, match="no model of scale w4-b8-e1-g0"):
        champions.of_scale("w4-b8-e1-g0")


def test_rolling_back_gives_it_to_the_one_before(champions: Champions) -> None:
    with pytest.raises(ConfigError, match="has no champion"):
        champions.roll_back("why")
    champions.promote("1", "first")
    with pytest.raises(ConfigError, match="nothing to go back to"):
        champions.roll_back("why")
    champions.promote("2", "better")
    assert champions.roll_back("it was not") == ("2", "1")
    champions.promote("3", "better still")
    # Not to 2, which lost it.
    assert champions.roll_back("it was not either") == ("3", "1")
    current = champions.current()
    assert current is not None
    assert current.version == "1"
    assert [version for _, version, _ in champions.history()] == ["1"]
    assert "rolled back from version 3: it was not either" in champions.history()[0][2]


def alias_set_in_mlflow(champions: Champions, version: str) -> None:
    champions.client.set_registered_model_alias("mlpipes-w", "champion", version)


def by_hand(champions: Champions) -> str:
    current = champions.current()
    assert current is not None
    return current.by_hand


def test_a_champion_that_a_person_chose_is_told_from_one_that_automation_chose(champions: Champions) -> None:
    champions.promote("1", "first")
    assert by_hand(champions) == ""
    alias_set_in_mlflow(champions, "2")
    assert by_hand(champions) == "the alias was set in MLflow"
    alias_set_in_mlflow(champions, "1")
    assert by_hand(champions) == "", "it is what automation had chosen"
    champions.promote("3", "as good", by_hand=True)
    assert by_hand(champions) == "by hand: as good"
    assert champions.release().version == "3"
    assert by_hand(champions) == ""
    champions.promote("1", "no", by_hand=True)
    champions.promote("2", "better")
    assert by_hand(champions) == ""
    champions.roll_back("no")
    assert by_hand(champions).startswith("rolled back from version 2")


def test_a_crash_between_record_and_alias_makes_nobody_a_person(
    champions: Champions, monkeypatch: pytest.MonkeyPatch
) -> None:
    champions.promote("1", "first")
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(
            champions.client, "set_registered_model_alias", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        champions.promote("2", "better")
    assert by_hand(champions) == ""
    champions.promote("2", "better")
    assert by_hand(champions) == ""


def test_rolling_back_restores_what_was_set_in_mlflow(champions: Champions) -> None:
    champions.promote("1", "first")
    alias_set_in_mlflow(champions, "2")
    champions.promote("3", "mine", by_hand=True)
    assert champions.roll_back("no") == ("3", "2")
    assert champions.roll_back("no") == ("2", "1")


def test_rolling_back_passes_over_what_was_deleted(champions: Champions) -> None:
    for version in ("1", "2", "3"):
        champions.promote(version, "better")
    champions.client.delete_model_version("mlpipes-w", "2")
    assert champions.roll_back("no") == ("3", "1")


def test_a_registry_of_before_says_by_its_history_who_chose(champions: Champions) -> None:
    champions.promote("1", "better")
    champions.client.delete_registered_model_tag("mlpipes-w", "mlpipes.automatic")
    assert by_hand(champions) == ""
    champions.promote("2", "mine", by_hand=True)
    champions.client.delete_registered_model_tag("mlpipes-w", "mlpipes.automatic")
    assert by_hand(champions) == "by hand: mine"
