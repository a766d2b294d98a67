"""`mlpipes dev`: what is left of a session that died."""

import subprocess
import sys
import uuid
from pathlib import Path

import dagster as dg
import psutil
import pytest

from mlpipes.compute.local import LocalRay
from mlpipes.errors import ConfigError
from mlpipes.orchestration.dev_server import _only_one, _prepare_storage
from mlpipes.orchestration.schedules import night_of_environment, nightly
from mlpipes.store.files import write_record
from mlpipes.workloads.catalog import entry_named


def test_unfinished_runs_of_an_earlier_session_are_seen(tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}")
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert not _prepare_storage(instance)
        for status, seen in ((dg.DagsterRunStatus.FAILURE, False), (dg.DagsterRunStatus.STARTED, True)):
            instance.add_run(dg.DagsterRun("digits_chain", run_id=str(uuid.uuid4()), status=status))
            assert _prepare_storage(instance) is seen


def test_a_ray_that_died_is_told_from_one_that_runs_or_was_ended(tmp_path: Path) -> None:
    ray = LocalRay(tmp_path)
    assert not ray.died(), "there was none"
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    state = {"pid": process.pid, "created": psutil.Process(process.pid).create_time(), "mark": "m", "temporary": "none"}
    write_record(tmp_path / "head.json", state)
    assert not ray.died()
    process.communicate(b"\n")
    assert ray.died()
    assert ray.stop()
    assert not ray.died()


def test_the_second_on_a_home_refuses_and_names_the_first(isolated_home: Path) -> None:
    with _only_one(3000):
        with (
            pytest.raises(
                ConfigError, match=r"serves .*home already \(Dagster UI: http://127.0.0.1:3000, process \d+\)"
            ),
            _only_one(3001),
        ):
            pass
        assert (isolated_home / "dev.json").is_file(), "the first one's note stays"
    with _only_one(3001):
        pass


def test_the_time_zone_of_the_nights_is_configured_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert night_of_environment() == (None, "UTC")
    monkeypatch.setenv("MLPIPES_NIGHTLY", "0 3 * * *")
    monkeypatch.setenv("MLPIPES_NIGHTLY_TIMEZONE", "Europe/Berlin")
    schedule = nightly(entry_named("digits"))
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("0 3 * * *", "Europe/Berlin")
    assert "Europe/Berlin" in (schedule.description or "")
    monkeypatch.setenv("MLPIPES_NIGHTLY", "99 99 * * *")
    with pytest.raises(ConfigError, match="MLPIPES_NIGHTLY=99 99"):
        nightly(entry_named("digits"))
