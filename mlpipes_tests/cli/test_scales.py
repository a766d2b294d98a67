"""Commands that take a workload or a scale: an unknown one is one clear error, one that was trained once is found."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlpipes.cli.app import app
from mlpipes.errors import ConfigError, ScaleError
from mlpipes.scales import RayScaleConfig
from mlpipes.store.files import write_record
from mlpipes.store.layout import Store
from mlpipes.store.recipe import Recipe
from mlpipes.store.status import trained_scales
from mlpipes.workloads.catalog import CATALOG, entry, entry_named

UNKNOWN = "w1-b128-e300-g0"
DECLARED = ", ".join(scale.key for scale in CATALOG[0].scales)
COMMANDS = [
    ["demo", "--workload", "digits", "--scale", UNKNOWN],
    ["backfill", "digits", "--scale", UNKNOWN],
    ["checkpoints", "digits", UNKNOWN],
    ["replay", "digits", UNKNOWN],
    ["history", "digits", UNKNOWN],
    ["predict", "digits", UNKNOWN, "text"],
    ["promote", "digits", UNKNOWN, "--reason", "a test"],
    ["compare", f"digits/{UNKNOWN}", f"digits/{UNKNOWN}"],
]
names = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])


def run(*command: str) -> str:
    """What a command that must fail prints; without what rich would wrap."""
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, list(command))
    assert result.exit_code == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), "no traceback"
    return result.output


def trained(home: Path, scale: str, workload: str = "digits") -> None:
    """A training in the store, as its recipe, and nothing else."""
    recipe = Recipe(
        workload=workload,
        implementation=CATALOG[0].implementation,
        snapshot="s" * 64,
        scale=RayScaleConfig.from_key(scale),
        hyperparameters={},
        seed=0,
        code="c",
    )
    folder = Store(home / "store").training(recipe.fingerprint)
    write_record(folder.recipe, recipe.model_dump(mode="json"))


@names
def test_an_unknown_scale_says_which_there_are_and_how_to_add_one(command: list[str], isolated_home: Path) -> None:
    trained(isolated_home, UNKNOWN, workload="docstrings")  # which helps digits nothing
    output = run(*command)
    assert f"ScaleError: digits has no scale {UNKNOWN}; it has {DECLARED}." in output
    assert f"MLPIPES_SCALES, for example\ndigits:\n  [{DECLARED}, {UNKNOWN}]" in output


@names
def test_an_unknown_workload_says_which_there_are(command: list[str]) -> None:
    output = run(*(word.replace("digits", "nope") for word in command))
    assert "ConfigError: unknown workload 'nope'; known are digits, cifar10, docstrings, sst2, video_sr." in output
    assert "mlpipes.workloads.catalog" in output


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (["history", "digits", UNKNOWN], f"digits {UNKNOWN} has not been evaluated yet"),
        (["replay", "digits", UNKNOWN], f"digits {UNKNOWN} has not been trained yet"),  # to the end, that is
        (["predict", "digits", UNKNOWN, "text"], f"digits {UNKNOWN} has no model yet"),
        (["compare", f"digits/{UNKNOWN}", f"digits/{UNKNOWN}"], f"digits/{UNKNOWN} has not been evaluated"),
    ],
)
def test_a_scale_that_was_trained_once_is_looked_for(command: list[str], answer: str, isolated_home: Path) -> None:
    trained(isolated_home, UNKNOWN)
    assert answer in run(*command)


def test_checkpoints_of_a_scale_that_was_trained_once_are_listed(isolated_home: Path) -> None:
    trained(isolated_home, UNKNOWN)
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["checkpoints", "digits", UNKNOWN])
    assert result.exit_code == 0, result.output
    assert f"No checkpoint of digits {UNKNOWN}" in result.output


@pytest.mark.parametrize("command", COMMANDS[:2], ids=["demo", "backfill"])
def test_what_is_to_be_trained_must_be_in_the_catalog(command: list[str], isolated_home: Path) -> None:
    trained(isolated_home, UNKNOWN)
    assert f"digits has no scale {UNKNOWN}" in run(*command)


def test_with_a_scale_file_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scales.yaml"
    path.write_text("digits: [w1-b8-e1-g0]")
    monkeypatch.setenv("MLPIPES_SCALES", str(path))
    output = run("checkpoints", "digits", UNKNOWN)
    assert f"it has w1-b8-e1-g0.\nTo have it, add it under `digits:` in {path}" in output


def test_the_example_of_the_error_is_a_scale_file_that_adds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ScaleError) as caught:
        CATALOG[0].scale(UNKNOWN)
    path = tmp_path / "scales.yaml"
    path.write_text(str(caught.value).partition("for example\n")[2])
    monkeypatch.setenv("MLPIPES_SCALES", str(path))
    assert entry_named("digits").scale(UNKNOWN).epochs == 300
    assert len(entry_named("digits").scales) == len(CATALOG[0].scales) + 1


def test_a_malformed_key_says_the_rule_and_which_there_are() -> None:
    with pytest.raises(
        ScaleError, match=r"'w1-b8' is not a scale key(.|\n)*\nmine has w1-b8-e1-g0; trained before: w9"
    ):
        entry("mine", "Mine", "m:a", ["w1-b8-e1-g0"]).scale("w1-b8", trained=["w9-b9-e9-g0"])


def test_the_store_is_only_read_for_what_the_catalog_lacks() -> None:
    def unread() -> object:
        raise AssertionError("the store was read")
        yield

    assert CATALOG[0].scale(CATALOG[0].scales[0].key, unread()) == CATALOG[0].scales[0]  # type: ignore[arg-type]


def test_trained_scales_are_those_of_the_workload_each_once(isolated_home: Path) -> None:
    store = Store(isolated_home / "store")
    assert list(trained_scales(store, "digits")) == []
    for scale, workload in (("w1-b8-e1-g0", "digits"), ("w2-b8-e1-g0", "digits"), ("w4-b8-e1-g0", "other")):
        trained(isolated_home, scale, workload)
    corrupt = store.training("f" * 64).recipe
    corrupt.parent.mkdir()
    corrupt.write_text("{")
    assert sorted(trained_scales(store, "digits")) == ["w1-b8-e1-g0", "w2-b8-e1-g0"]


def test_another_catalog_may_be_asked() -> None:
    mine = entry("mine", "Mine", "m:a", ["w1-b8-e1-g0"])
    assert entry_named("mine", [mine]) is mine
    with pytest.raises(ConfigError, match="unknown workload 'digits'; known are mine"):
        entry_named("digits", [mine])


def test_what_a_disk_says_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "store").write_text("no folder")
    monkeypatch.setenv("MLPIPES_HOME", str(home))
    assert run("store", "--adopt").startswith("NotADirectoryError: Not a directory: ")
