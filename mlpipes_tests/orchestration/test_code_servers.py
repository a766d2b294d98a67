"""Code servers: those that a workspace asks for, and whether one has loaded."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from mlpipes.errors import ConfigError
from mlpipes.orchestration import code_servers as module
from mlpipes.orchestration.code_servers import code_servers, heal, is_loaded, option
from mlpipes_tests.sandbox import free_port


def test_modules_get_servers_and_the_rest_is_taken_over(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace.yaml"
    remote = {"grpc_server": {"host": "elsewhere", "port": 4000}}
    named = {"python_module": {"module_name": "mine.definitions", "location_name": "mine"}}
    workspace.write_text(yaml.safe_dump({"load_from": [{"python_module": "mlpipes.definitions"}, named, remote]}))
    servers, path = code_servers(workspace, tmp_path)
    assert [option(options, "-m") for options in servers] == ["mlpipes.definitions", "mine.definitions"]
    entries = yaml.safe_load(path.read_text())["load_from"]
    assert entries[2] == remote
    assert [entry["grpc_server"]["location_name"] for entry in entries[:2]] == ["mlpipes.definitions", "mine"]
    assert [entry["grpc_server"]["socket"] for entry in entries[:2]] == [option(o, "-s") for o in servers]


def test_without_a_workspace_our_own_definitions_are_served(tmp_path: Path) -> None:
    servers, _ = code_servers(tmp_path / "none.yaml", tmp_path)
    assert len(servers) == 1
    assert "mlpipes.definitions" in servers[0]


def test_what_is_no_workspace_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "workspace.yaml").write_text("load: []")
    with pytest.raises(ConfigError, match="is not a workspace file with a list `load_from`"):
        code_servers(tmp_path / "workspace.yaml", tmp_path)


def test_one_that_does_not_listen_has_not_loaded(short: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert not is_loaded(str(short / "0.sock"))
    captured = capfd.readouterr()
    assert captured.out + captured.err == "", "asked five times a second: it must be quiet"


def test_while_no_webserver_answers_there_is_nothing_to_heal() -> None:
    assert heal(f"http://127.0.0.1:{free_port()}/graphql", {}) is None


def test_code_that_is_not_reachable_is_reloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    asked: list[str] = []
    before: dict[str, float] = {"good": 0.0}

    class Answer:
        def json(self) -> object:
            gone = {"message": "dagster._core.errors.DagsterUserCodeUnreachableError: Could not reach user code server"}
            broken = {"message": "ScaleError: not of the server, but of the code"}
            entries = [
                {"name": "good", "locationOrLoadError": {}},
                {"name": "loading", "locationOrLoadError": None},
                {"name": "gone", "locationOrLoadError": gone},
                {"name": "broken", "locationOrLoadError": broken},
            ]
            return {"data": {"workspaceOrError": {"locationEntries": entries}}}

    def post(address: str, json: dict[str, str], timeout: float) -> Answer:
        asked.append(json["query"])
        return Answer()

    monkeypatch.setattr(requests, "post", post)
    reload = 'mutation { reloadRepositoryLocation(repositoryLocationName: "gone") { __typename } }'
    for now, times in ((1000.0, 1), (1010.0, 1), (1031.0, 2)):  # what loads is given time for it
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda at=now: at))
        assert heal("http://127.0.0.1:3000/graphql", before) == {"gone"}
        assert [query for query in asked if "reload" in query] == [reload] * times
    assert set(before) == {"gone"}, "what is there again is asked for at once if it dies again"
