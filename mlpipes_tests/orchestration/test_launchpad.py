"""Settings on the command line: options before the file, as in the launchpad, and found again by their fingerprint."""

from pathlib import Path
from typing import Any

import pytest

from mlpipes.errors import ConfigError
from mlpipes.orchestration.backfill import DagsterUi, launch
from mlpipes.orchestration.launchpad import described, is_trained, run_config, settings_of
from mlpipes.orchestration.training import make_recipe
from mlpipes.store.layout import Store
from mlpipes.store.references import (
    ChampionReference,
    DatasetReference,
    EvaluationReference,
    ModelReference,
    SnapshotReference,
    TrainingReference,
)
from mlpipes.workloads.catalog import entry_named

DIGITS = entry_named("digits")
SCALE = DIGITS.scales[0]
FLAT = "seed: 1\nhyperparameters: {learning_rate: 0.1}\nkeep_last: 3\n"
LAUNCHPAD = """ops:
  digits__checkpoints:
    config: {seed: 1, hyperparameters: {learning_rate: 0.1}, keep_last: 3}
"""


@pytest.mark.parametrize("content", [FLAT, LAUNCHPAD])
def test_a_file_has_the_lines_of_the_launchpad_or_all_of_it(content: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    found = settings_of(DIGITS, path, ["learning_rate=0.2", "min_workers=1"], seed=7)
    assert found is not None
    assert (found.seed, found.hyperparameters, found.keep_last, found.min_workers) == (7, {"learning_rate": 0.2}, 3, 1)
    assert run_config(DIGITS, found)["ops"]["digits__checkpoints"]["config"] == {
        "seed": 7,
        "hyperparameters": {"learning_rate": 0.2},
        "keep_last": 3,
        "min_workers": 1,
    }
    assert described(found) == "seed 7, keep_last 3, min_workers 1, learning_rate 0.2"


@pytest.mark.parametrize("written", ["1e-3", "1E-3", "0.001", "1.0e-3"])
def test_a_number_is_one_however_it_is_written(written: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(f"stall_seconds: {written}\nhyperparameters: {{learning_rate: {written}}}\n")
    changes = [f"stall_seconds={written}", f"learning_rate={written}"]
    for found in (settings_of(DIGITS, path), settings_of(DIGITS, changes=changes)):
        assert found is not None
        assert (found.stall_seconds, found.hyperparameters) == (0.001, {"learning_rate": 0.001})


def test_nothing_set_is_no_setting() -> None:
    assert settings_of(DIGITS) is None
    assert run_config(DIGITS, None) == {}


def test_an_unknown_name_lists_those_that_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"no hyperparameter 'lr'; it has .*learning_rate.*Other settings are seed, fresh"
    ):
        settings_of(DIGITS, changes=["lr=1"])


def test_a_truth_value_is_no_number(tmp_path: Path) -> None:
    (path := tmp_path / "x.yaml").write_text("hyperparameters: {deterministic: no}")
    assert (found := settings_of(DIGITS, path))
    assert found.hyperparameters == {"deterministic": False}
    for name in ("learning_rate", "micro_batch", "logical_shards"):
        with pytest.raises(ConfigError, match=rf"{name}: write a number, .* and not true or false \(got True\)"):
            settings_of(DIGITS, changes=[f"{name}=yes"])


def stored(root: Path, learning_rate: float) -> Store:
    """A store with all that a chain of these settings leaves behind."""
    store = Store(root)
    config = settings_of(DIGITS, changes=[f"learning_rate={learning_rate}"])
    assert config is not None
    fingerprint = make_recipe(DIGITS, SCALE.key, "d", config, "").fingerprint
    training = store.training(fingerprint)
    for folder in (store.snapshots / "d", training.model, training.evaluation("e")):
        folder.mkdir(parents=True)
    training.result.touch()
    trained = {"fingerprint": fingerprint, "mlflow_run_id": "r", "snapshot": "d"}
    evaluated = trained | {"registered_model": "m", "version": "1", "evaluation": "e", "estimates": {}}
    for reference in (
        DatasetReference(digest="source", provenance={}, counts={}),
        SnapshotReference(digest="d"),
        *(kind.model_validate(evaluated) for kind in (TrainingReference, ModelReference, EvaluationReference)),
        ChampionReference.model_validate(evaluated | {"champion": "1"}),
    ):
        store.write_reference(reference, "digits", SCALE.key)
    return store


def test_what_is_trained_goes_by_the_fingerprint_and_not_by_dagster(tmp_path: Path) -> None:
    store, launched = stored(tmp_path, 0.1), []
    ui = DagsterUi("http://nowhere")

    def ask(query: str, **variables: Any) -> Any:
        assert "launchPartitionBackfill" in query, "Dagster's word is not asked for"
        launched.append(variables["params"])
        return {"launchPartitionBackfill": {"backfillId": "b"}}

    ui.ask = ask  # type: ignore[method-assign]

    def fresh(**settings: Any) -> list[str]:
        config = settings_of(DIGITS, **settings)
        return launch(ui, DIGITS, [SCALE], store, smallest_first=False, again=False, config=config)[1]

    assert fresh(changes=["learning_rate=0.1"]) == [SCALE.key]
    assert fresh(changes=["learning_rate=0.1", "keep_last=9"]) == [SCALE.key], "it is the same model"
    assert not launched
    assert fresh(changes=["learning_rate=0.1"], fresh=True) == []
    assert fresh(changes=["learning_rate=0.2"]) == []
    assert fresh(changes=["learning_rate=0.1"], seed=1) == []
    assert [params["runConfigData"]["ops"]["digits__checkpoints"]["config"] for params in launched] == [
        {"hyperparameters": {"learning_rate": 0.1}, "fresh": True},
        {"hyperparameters": {"learning_rate": 0.2}},
        {"hyperparameters": {"learning_rate": 0.1}, "seed": 1},
    ]
    config = settings_of(DIGITS, changes=["learning_rate=0.1"])
    assert config is not None
    assert not is_trained(DIGITS, SCALE.key, config, Store(tmp_path / "other"))
