"""`mlpipes dev`: a workspace file becomes code servers on private sockets."""

from pathlib import Path

import pytest
import yaml

from mlpipes.development import code_servers
from mlpipes.errors import ConfigError


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
