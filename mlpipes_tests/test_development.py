"""`mlpipes dev`: code servers on private sockets, and what is left of a session that died."""

import subprocess
import sys
import uuid
from pathlib import Path

import dagster as dg
import psutil
import pytest
import yaml

from mlpipes.compute.local import LocalRay
from mlpipes.development import _prepare_storage, code_servers
from mlpipes.errors import ConfigError
from mlpipes.files import write_record


def test_modules_get_servers_and_the_rest_is_taken_over(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace.yaml"
    remote = {"grpc_server": {"host": "elsewhere", "port": 4000}}
    named = {"python_module": {"module_name": "mine.definitions", "location_name": "mine"}}
    workspace.write_text(yaml.safe_dump({"load_from": [{"python_module": "mlpipes.definitions"}, named, remote]}))
    servers, path = code_servers(workspace, tmp_path)
    assert [options[options.index("-m") + 1] for options in servers] == ["mlpipes.definitions", "mine.definitions"]
    entries = yaml.safe_load(path.read_text())["load_from"]
    assert entries[2] == remote
    assert [entry["grpc_server"]["location_name"] for entry in entries[:2]] == ["mlpipes.definitions", "mine"]
    assert [entry["grpc_server"]["socket"] for entry in entries[:2]] == [o[o.index("-s") + 1] for o in servers]


def test_without_a_workspace_our_own_definitions_are_served(tmp_path: Path) -> None:
    servers, _ = code_servers(tmp_path / "none.yaml", tmp_path)
    assert len(servers) == 1
    assert "mlpipes.definitions" in servers[0]


def test_what_is_no_workspace_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "workspace.yaml").write_text("load: []")
    with pytest.raises(ConfigError, match="is not a workspace file with a list `load_from`"):
        code_servers(tmp_path / "workspace.yaml", tmp_path)


def test_unfinished_runs_of_an_earlier_session_are_seen(tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}")
    assert not _prepare_storage(str(tmp_path))
    for status, seen in ((dg.DagsterRunStatus.FAILURE, False), (dg.DagsterRunStatus.STARTED, True)):
        with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
            instance.add_run(dg.DagsterRun("digits_chain", run_id=str(uuid.uuid4()), status=status))
        assert _prepare_storage(str(tmp_path)) is seen


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
