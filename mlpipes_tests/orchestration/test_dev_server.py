"""`mlpipes dev`: what is left of a session that died."""

import subprocess
import sys
import uuid
from pathlib import Path

import dagster as dg
import psutil

from mlpipes.compute.local import LocalRay
from mlpipes.orchestration.dev_server import _prepare_storage
from mlpipes.store.files import write_record


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
