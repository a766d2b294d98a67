"""Dagster's instance: what its settings name is there."""

from pathlib import Path

import dagster as dg
import pytest

from mlpipes.errors import ConfigError
from mlpipes.orchestration.instance import check_run_launcher

SETTINGS = "run_launcher:\n  module: {}\n  class: SupervisedRunLauncher\n"


def test_a_run_launcher_that_has_moved_is_an_error_before_a_run_needs_it(tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_text(SETTINGS.format("mlpipes.supervision"))
    moved = pytest.raises(ConfigError, match=r"mlpipes\.supervision.*docs/upgrading\.md")
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance, moved:
        check_run_launcher(instance)
    (tmp_path / "dagster.yaml").write_text(SETTINGS.format("mlpipes.orchestration.run_launcher"))
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        check_run_launcher(instance)
