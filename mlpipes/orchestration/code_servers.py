"""Dagster's code servers: which ones a workspace file asks for, whether they have loaded, and healing what they serve."""

import time
from pathlib import Path
from typing import Any

import yaml

from mlpipes.errors import ConfigError

_LOCATIONS = """{ workspaceOrError { ... on Workspace { locationEntries { name locationOrLoadError {
  ... on PythonError { message } } } } } }"""
_RELOAD = 'mutation { reloadRepositoryLocation(repositoryLocationName: "%s") { __typename } }'
_RELOAD_SECONDS = 30.0
"""How long what was asked to load is given for it, before it is asked again."""


def code_servers(workspace: Path, folder: Path) -> tuple[list[list[str]], Path]:
    """Options of the code servers of a workspace file's Python modules, and a workspace file in `folder` that names them.

    Entries of other kinds are taken over as they are. Without a file, there is one server, with this program's definitions.
    Raises ConfigError for a file that is no workspace.
    """
    try:
        entries = yaml.safe_load(workspace.read_text(encoding="utf-8"))["load_from"]
    except FileNotFoundError:
        entries = [{"python_module": "mlpipes.definitions"}]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f"{workspace.absolute()} is not a workspace file with a list `load_from`: {error}") from error
    servers, taken_over = [], []
    for number, entry in enumerate(entries):
        module = entry.get("python_module")
        if module is None:
            taken_over.append(entry)
            continue
        described = {"module_name": module} if isinstance(module, str) else module
        name, socket_path = described["module_name"], str(folder / f"{number}.sock")
        location = described.get("location_name") or name
        directory = str(Path(described.get("working_directory", ".")).absolute())
        servers.append(["-m", name, "-s", socket_path, "-d", directory, "--location-name", location])
        taken_over.append({"grpc_server": {"socket": socket_path, "location_name": location}})
    path = folder / "workspace.yaml"
    path.write_text(yaml.safe_dump({"load_from": taken_over}), encoding="utf-8")
    return servers, path


def option(options: list[str], flag: str) -> str:
    """The value of one of a code server's options."""
    return options[options.index(flag) + 1]


def is_loaded(socket: str) -> bool:
    """Whether the code server at a Unix socket listens and has loaded its definitions.

    Raises ConfigError with what its code raised if that failed. (Its health check says SERVING then, too.)
    """
    from dagster._api.list_repositories import sync_list_repositories_grpc
    from dagster._core.errors import DagsterUserCodeProcessError, DagsterUserCodeUnreachableError
    from dagster._grpc.client import DagsterGrpcClient

    try:
        sync_list_repositories_grpc(DagsterGrpcClient(socket=socket))
    except DagsterUserCodeUnreachableError:
        return False
    except DagsterUserCodeProcessError as error:
        found = error.user_code_process_error_infos[0]
        raise ConfigError((found.cause or found).message.strip()) from error  # the first one is only Dagster's frame
    return True


def heal(address: str, asked: dict[str, float]) -> set[str] | None:
    """Have Dagster start code again whose server died: by itself it waits for somebody to press "Reload".

    `address` is the webserver's GraphQL; `asked` is kept between looks, and says when a location was last asked for:
    loading takes a while, and asking meanwhile has it done once more. Returns the names of the code locations that were not
    reachable; None if the webserver does not say, for it is starting, or busy.
    """
    import requests

    def ask(query: str) -> Any:
        return requests.post(address, json={"query": query}, timeout=5).json()["data"]

    dead = None
    try:
        entries = ask(_LOCATIONS)["workspaceOrError"].get("locationEntries", [])
        dead = set()
        for entry in entries:
            name = entry["name"]
            if "DagsterUserCodeUnreachableError" not in (entry["locationOrLoadError"] or {}).get("message", ""):
                asked.pop(name, None)
                continue
            dead.add(name)
            if time.monotonic() - asked.get(name, float("-inf")) > _RELOAD_SECONDS:
                asked[name] = time.monotonic()
                ask(_RELOAD % name)
    except (requests.RequestException, ValueError, KeyError, TypeError, AttributeError):
        pass  # the next look tells
    return dead
