"""Dagster's instance: what its settings name is there."""

import os
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from mlpipes.errors import ConfigError
from mlpipes.orchestration.instance import check_run_launcher, dagster_home
from mlpipes_tests.sandbox import CHECKOUT

SETTINGS = "run_launcher:\n  module: {}\n  class: SupervisedRunLauncher\n"


def test_a_run_launcher_that_has_moved_is_an_error_before_a_run_needs_it(tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_text(SETTINGS.format("mlpipes.supervision"))
    moved = pytest.raises(ConfigError, match=r"mlpipes\.supervision.*docs/upgrading\.md")
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance, moved:
        check_run_launcher(instance)
    (tmp_path / "dagster.yaml").write_text(SETTINGS.format("mlpipes.orchestration.run_launcher"))
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        check_run_launcher(instance)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Dagster's settings go outside a checkout whose home folder is `.mlpipes`; the current folder is such a one."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("MLPIPES_HOME", str(tmp_path / ".mlpipes"))
    return tmp_path / ".mlpipes" / "dagster"


def settings_of(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "dagster.yaml").read_text(encoding="utf-8"))


def test_outside_a_checkout_dagster_has_the_same_settings_and_the_same_history(tmp_path: Path, folder: Path) -> None:
    assert dagster_home() == folder
    assert os.environ.pop("DAGSTER_HOME") == str(folder)
    assert not list(Path.cwd().iterdir())
    expected = settings_of(CHECKOUT)
    for owner in (
        expected["storage"]["sqlite"],
        expected["local_artifact_storage"]["config"],
        expected["compute_logs"]["config"],
    ):
        owner["base_dir"] = str(tmp_path / owner["base_dir"])
    assert settings_of(folder) == expected
    with dg.DagsterInstance.from_config(str(folder)) as instance:
        check_run_launcher(instance)


def test_a_dagster_home_of_the_users_own_has_the_settings_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them, Dagster would neither watch over its runs nor limit them, and would send telemetry."""
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    assert dagster_home() == tmp_path
    settings = settings_of(tmp_path)
    assert settings["storage"] == {"sqlite": {"base_dir": str(tmp_path / "storage")}}
    assert (settings["run_retries"], settings["telemetry"]) == (
        settings_of(CHECKOUT)["run_retries"],
        {"enabled": False},
    )
    monkeypatch.setenv("DAGSTER_HOME", str(CHECKOUT))
    before = (CHECKOUT / "dagster.yaml").read_text()
    assert dagster_home() == CHECKOUT
    assert (CHECKOUT / "dagster.yaml").read_text() == before, "settings of one's own are left alone"


def test_a_desk_in_containers_has_the_same_settings_but_for_where_its_history_is() -> None:
    desk, own = settings_of(CHECKOUT / "deploy" / "docker" / "desk"), settings_of(CHECKOUT)
    for name in ("storage", "local_artifact_storage", "compute_logs"):
        assert desk.pop(name) != own.pop(name)
    assert desk == own


def test_its_settings_follow_mlpipes_unless_they_are_the_users_own(folder: Path) -> None:
    dagster_home()
    path, written = folder / "dagster.yaml", settings_of(folder)
    first = path.read_text().partition("\n")[0]
    for text, expected in ((f"{first}\ntelemetry: {{}}", written), ("telemetry: {}", {"telemetry": {}})):
        path.write_text(text)
        del os.environ["DAGSTER_HOME"]
        dagster_home()
        assert settings_of(folder) == expected


def test_a_history_from_before_there_were_settings_is_kept(folder: Path) -> None:
    folder.mkdir(parents=True)
    with dg.DagsterInstance.from_config(str(folder)) as instance:
        instance.report_runless_asset_event(dg.AssetMaterialization("it"))
    dagster_home()
    with dg.DagsterInstance.from_config(str(folder)) as instance:
        assert instance.get_latest_materialization_event(dg.AssetKey("it"))
