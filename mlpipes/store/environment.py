"""Environment variables: one table of those that matter, what becomes of each in our processes, and what it may hold.

What is not in the table is kept as it is. docs/configuration.md lists the same variables; a test compares the two.
"""

import difflib
import os
import re
import socket
import zoneinfo
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from mlpipes.errors import ConfigError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""What no proxy ever stands before: our own servers."""
TRACKING_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")
_PROXIES = ("http", "https", "socks4", "socks4a", "socks5", "socks5h")
_PROXY_EXEMPTIONS = ("no_proxy", "NO_PROXY")
_GRPC_EXEMPTION = "no_grpc_proxy"
"""Where it is set, gRPC looks at it instead of `no_proxy`."""


class Fate(StrEnum):
    """What becomes of a variable in our own processes and in those that we start."""

    KEPT = "kept"
    """It is the user's word."""
    PINNED = "pinned"
    """It has our value, whatever the user's is."""
    DROPPED = "dropped"
    """It would send us elsewhere."""


@dataclass(frozen=True)
class Variable:
    """One row of the table."""

    name: str
    fate: Fate = Fate.KEPT
    check: Callable[[str], None] | None = None
    """Raises ValueError, saying what is expected, for a value that is none; None where any text is one."""
    secret: bool = False
    """Whether its value is never shown."""
    value: str = ""
    """Of a pinned variable, ours; empty where it differs from process to process."""


# -- what values may be ----------------------------------------------------------------------------------------------
def _path(text: str) -> Path:
    if "://" in text:
        raise ValueError("that is an address; name a folder or a file of this machine")
    if variable := re.search(r"\$([A-Za-z_]\w*|\{\w+\})", text, re.ASCII):
        raise ValueError(f"{variable[0]} in it is not replaced by what it stands for; write the path itself")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{text.partition('/')[0]} is no user's home folder; write an absolute path") from error


def _folder(text: str) -> None:
    """A folder, or one that can be made."""
    path = _path(text)
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is a file; name a folder")
    if there != path and not os.access(there, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ValueError(f"it is not there and cannot be made in {there}; name a folder that you may write to")


def _existing_folder(text: str) -> None:
    if not _path(text).is_dir():
        raise ValueError("there is no such folder; make it, or unset the variable")


def _file(text: str) -> None:
    path = _path(text)
    if not path.is_file():
        raise ValueError("there is no such file; name one, or unset the variable")
    try:
        path.open("rb").close()  # os.access would not know of capabilities
    except OSError as error:
        raise ValueError("the file cannot be read; change its permissions, or name another") from error


def _is_address(text: str, schemes: tuple[str, ...]) -> bool:
    try:
        parts = urlsplit(text)  # of a bracket that is not closed: ValueError
        _ = parts.port  # not a number, or beyond 65535: ValueError
    except ValueError:
        return False
    odd = re.search(r"[\s\x00-\x20\x7f]", text) or parts.port == 0
    return parts.scheme in schemes and bool(parts.hostname) and not odd


def _address(text: str) -> None:
    """`http://host[:port]`, with or without a path."""
    if not _is_address(text, ("http", "https")):
        raise ValueError("write an address such as http://host:8265")


def _token(text: str) -> None:
    if len(text) < 16 or not re.fullmatch(r"[\x21-\x7e]+", text):
        raise ValueError("write 16 characters at least, without blanks, such as `openssl rand -hex 32` makes")


def _proxy(text: str) -> None:
    if not _is_address(text if "://" in text else f"http://{text}", _PROXIES):
        raise ValueError("write an address such as http://proxy:3128")


def _tracking(text: str) -> None:
    if text.startswith("file:") or "://" not in text:
        raise ValueError("MLflow has dropped file stores; use sqlite:///… or a server's http://…")
    scheme, _, rest = text.partition("://")
    if scheme.partition("+")[0] not in TRACKING_SCHEMES:
        raise ValueError(f"use one of {', '.join(f'{known}://' for known in TRACKING_SCHEMES)}")
    if scheme in ("http", "https"):
        _address(text)
    elif scheme.startswith("sqlite"):
        if scheme not in ("sqlite", "sqlite+pysqlite"):
            raise ValueError(
                f"there is no driver {scheme.partition('+')[2]!r} of SQLite; use sqlite:///folder/mlflow.db"
            )
        place = rest.partition("?")[0].removeprefix("/")
        if not place or ":memory:" in place:
            raise ValueError("a database in memory is gone with each process; use sqlite:///folder/mlflow.db")
        if _path(place).is_dir():
            raise ValueError("that is a folder; name a file in it, such as sqlite:///folder/mlflow.db")
        _folder(str(_path(place).parent))
    elif not _is_address(text, (scheme,)):
        raise ValueError(f"the database's server is missing; write {scheme}://user@host/database")


def _cron(text: str) -> None:
    """By shape; Dagster, which the schedules know, looks at the numbers."""
    macros = ("@hourly", "@daily", "@midnight", "@weekly", "@monthly", "@yearly", "@annually")
    if text not in macros and len(text.split()) != 5:
        raise ValueError("write a cron expression: minute, hour, day, month, weekday, such as 0 2 * * *")


def _timezone(text: str) -> None:
    try:
        zoneinfo.ZoneInfo(text)
    except (KeyError, ValueError, OSError) as error:
        raise ValueError("write a time zone such as Europe/Berlin or UTC") from error


def _price(text: str) -> None:
    if not re.fullmatch(r"(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", text, re.ASCII | re.IGNORECASE) or float(text) == float(
        "inf"
    ):
        raise ValueError("it is not a price per hour, such as 2.50")


def _seconds(text: str) -> None:
    if not re.fullmatch(r"[1-9]\d{0,5}", text, re.ASCII):
        raise ValueError("write whole seconds, such as 1")


def _interval(text: str) -> None:
    if not re.fullmatch(r"\d{1,4}(\.\d{1,3})?", text, re.ASCII) or float(text) == 0:
        raise ValueError("write seconds, such as 0.5")


def _retries(text: str) -> None:
    if not re.fullmatch(r"\d", text, re.ASCII):  # MLflow's client takes no more than 10
        raise ValueError("write a number of retries, such as 1")


def _bytes(text: str) -> None:
    if not re.fullmatch(r"\d+", text, re.ASCII):  # glibc says nothing about what it cannot read
        raise ValueError("write a number of bytes, such as 1073741824")


def _switch(text: str) -> None:
    if text.lower() not in ("0", "1", "true", "false", "on", "off", "yes", "no"):
        raise ValueError("write 1 or 0")


def _level(text: str) -> None:
    levels = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    if text.upper() not in levels:
        raise ValueError(f"write one of {', '.join(levels)}")


def _interface(text: str) -> None:
    known = [name for _, name in socket.if_nameindex()]
    elsewhere = ("MLPIPES_SLURM", "MLPIPES_KUBERNETES", "MLPIPES_RAY_ADDRESS", "KUBERNETES_SERVICE_HOST")
    if not any(map(os.environ.get, elsewhere)) and not all(name in known for name in text.split(",")):
        raise ValueError(f"this machine's network interfaces are {', '.join(known)}")


def _devices(text: str) -> None:
    if not all(re.fullmatch(r"-?\d+|(GPU|MIG)-[\w/-]+|NoDevFiles", name.strip()) for name in text.split(",")):
        raise ValueError("write the numbers of GPUs, such as 0,1")


def _workspace(text: str) -> None:
    if text not in (":4096:8", ":16:8"):
        raise ValueError("cuBLAS is deterministic with :4096:8 and :16:8 only")


def _mode(text: str) -> None:
    if text.lower() not in ("token", "disabled", "k8s"):
        raise ValueError("write token or disabled")


_K, _P, _D = Fate.KEPT, Fate.PINNED, Fate.DROPPED
TABLE: Mapping[str, Variable] = {
    variable.name: variable
    for variable in (
        Variable("MLPIPES_HOME", _K, _folder),
        Variable("MLPIPES_SCALES", _K, _file),
        Variable("MLPIPES_RAY_ADDRESS", _K, _address),
        Variable("MLPIPES_SLURM", _K, _file),
        Variable("MLPIPES_KUBERNETES", _K, _file),
        Variable("MLPIPES_CIFAR10", _K, _folder),
        Variable("MLPIPES_SST2", _K, _folder),
        Variable("MLPIPES_SST2_MODEL"),
        Variable("MLPIPES_VIDEOS", _K, _existing_folder),
        Variable("MLPIPES_INPUTS", _K, _existing_folder),
        Variable("MLPIPES_NIGHTLY", _K, _cron),
        Variable("MLPIPES_NIGHTLY_TIMEZONE", _K, _timezone),
        Variable("MLPIPES_WEBHOOK", _K, _address, secret=True),
        Variable("MLPIPES_SERVE_TOKEN", _K, _token, secret=True),
        Variable("MLPIPES_GPU_HOUR", _K, _price),
        Variable("MLPIPES_CPU_HOUR", _K, _price),
        Variable("MLPIPES_DAGSTER_UI", _K, _address),
        Variable("MLPIPES_MLFLOW_UI", _K, _address),
        # Of other programs.
        Variable("MLFLOW_TRACKING_URI", _K, _tracking),
        Variable("MLFLOW_TRACKING_USERNAME"),
        Variable("MLFLOW_TRACKING_PASSWORD", secret=True),
        Variable("MLFLOW_TRACKING_TOKEN", secret=True),
        Variable("MLFLOW_S3_ENDPOINT_URL", _K, _address),
        Variable("AWS_ACCESS_KEY_ID", secret=True),
        Variable("AWS_SECRET_ACCESS_KEY", secret=True),
        Variable("AWS_SESSION_TOKEN", secret=True),
        Variable("MLFLOW_LOGGING_LEVEL", _K, _level),
        Variable("MLFLOW_DISABLE_TELEMETRY", _K, _switch),
        Variable("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", _K, _switch),
        Variable("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", _K, _switch),
        Variable("MLFLOW_HTTP_REQUEST_MAX_RETRIES", _K, _retries),
        Variable("MLFLOW_HTTP_REQUEST_TIMEOUT", _K, _seconds),
        Variable("KUBECONFIG"),
        Variable("DAGSTER_HOME", _K, _existing_folder),
        Variable("DAGSTER_EVENT_LOG_CONSUMER_DAEMON_INTERVAL_SECONDS", _K, _seconds),
        Variable("DAGSTER_GRPC_TIMEOUT_SECONDS", _K, _seconds),
        Variable("DAGSTER_GRPC_PROXY_HEARTBEAT_TTL_SECONDS", _K, _seconds),
        Variable("HF_HUB_OFFLINE", _K, _switch),
        Variable("HF_HUB_DISABLE_PROGRESS_BARS", _K, _switch),
        Variable("HF_HOME", _K, lambda text: _folder(os.path.expandvars(text))),  # as the hub's library does
        Variable("HF_ENDPOINT", _K, _address),
        Variable("HF_TOKEN", secret=True),
        *(Variable(name, _K, _proxy) for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy")),
        *(Variable(name, _K, _proxy) for name in ("ALL_PROXY", "all_proxy")),
        Variable("RAY_AUTH_MODE", _K, _mode),
        Variable("RAY_AUTH_TOKEN", secret=True),
        Variable("RAY_AUTH_TOKEN_PATH", _K, _file),
        Variable("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _K, _interval),
        Variable("GLOO_SOCKET_IFNAME", _K, _interface),
        Variable("CUDA_VISIBLE_DEVICES", _K, _devices),
        Variable("CUBLAS_WORKSPACE_CONFIG", _K, _workspace),
        Variable("TMPDIR", _K, _existing_folder),
        *(Variable(name, _K, _bytes) for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")),
        Variable("GLIBC_TUNABLES"),
        # What is ours in every process of ours.
        Variable("RAY_TRAIN_V2_ENABLED", _P, value="1"),
        Variable("RAY_USAGE_STATS_ENABLED", _P, value="0"),
        *(Variable(name, _P) for name in ("MLPIPES_RAY_HEAD", "MLPIPES_RAY_FOLDER", "MLPIPES_WARM_RUNS")),
        *(Variable(name, _P) for name in ("MLPIPES_FINGERPRINT", "MLPIPES_SLURM_PYTHON")),
        *(Variable(name, _P) for name in ("PYTHONPATH", "PYTHONUNBUFFERED", "no_proxy", "NO_PROXY", "no_grpc_proxy")),
        *(Variable(name, _P) for name in ("OMP_NUM_THREADS", "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER")),
        Variable("TORCHINDUCTOR_DETERMINISTIC", _P),
        Variable("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", _P),
        Variable("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", _P),
        Variable("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", _P),
        # What would send jobs, their token, runs or models elsewhere.
        *(Variable(name, _D) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_REDIS_ADDRESS")),
        *(Variable(name, _D) for name in ("RAY_NAMESPACE", "RAY_JOB_HEADERS", "MLFLOW_REGISTRY_URI")),
        *(Variable(name, _D) for name in ("MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID")),
    )
}
CREDENTIALS = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_S3_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
"""What a driver needs besides the address of MLflow to reach it, and its artifacts."""


# -- reading ---------------------------------------------------------------------------------------------------------
def value_of(name: str) -> str | None:
    """A variable's value; None where it is unset or empty. Raises ConfigError, naming it, if it is none."""
    if not (text := os.environ.get(name)):
        return None
    variable = TABLE[name]
    try:
        if text != text.strip():
            raise ValueError("there are blanks or line breaks around it; remove them")
        if variable.check is not None:
            variable.check(text)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{name}{'' if variable.secret else f'={text}'}: {error}") from error
    return text


def path_in(name: str) -> Path | None:
    """The absolute path that a variable holds, `~` replaced; None where it is unset. Raises ConfigError."""
    return None if (text := value_of(name)) is None else _path(text)


def tracking_uri(text: str) -> str:
    """An MLflow address with the file of SQLite absolute: a driver is started in another folder.

    Raises ValueError for what MLflow cannot use.
    """
    _tracking(text)
    scheme, _, rest = text.partition("://")
    if not scheme.startswith("sqlite"):
        return text
    place, mark, options = rest.partition("?")
    return f"{scheme}:///{_path(place.removeprefix('/'))}{mark}{options}"


def check_all() -> None:
    """Raises ConfigError, naming the variable, if one of the table that is kept has an unusable value."""
    for variable in TABLE.values():
        if variable.fate is Fate.KEPT:
            value_of(variable.name)


def misspelt() -> list[str]:
    """What to tell about variables whose names are nearly, and only nearly, those of ours: they have no effect."""
    ours = [name for name in TABLE if name.startswith("MLPIPES_")]
    strange = (name for name in sorted(os.environ) if name.startswith("MLPIPES_") and name not in ours)
    return [
        f"{name} is no variable of mlpipes, and has no effect. Is {near[0]} meant?"
        for name in strange
        if (near := difflib.get_close_matches(name, ours, 1, 0.85))
    ]


# -- our processes ---------------------------------------------------------------------------------------------------
def for_children(*without: str, unproxied: str = "") -> dict[str, str]:
    """The environment of a process that we start: this one's by the table, less `without`.

    Proxies stand before no host of ours: loopback and `unproxied`.
    """
    dropped = {name for name, variable in TABLE.items() if variable.fate is Fate.DROPPED} | set(without)
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {name: variable.value for name, variable in TABLE.items() if variable.value}
    exempt = [*LOOPBACK, *([unproxied] if unproxied else [])]
    # Programs differ in which of the two they read; the lower one wins where both are read.
    given = environment.get(_PROXY_EXEMPTIONS[0]) or environment.get(_PROXY_EXEMPTIONS[1]) or ""
    exemptions, grpc = _joined(given, exempt), environment.get(_GRPC_EXEMPTION, "")
    if "*" in exemptions.split(","):
        exemptions, grpc = "*", grpc or given  # which means all hosts only where it stands alone, and nothing to gRPC
    environment |= dict.fromkeys(_PROXY_EXEMPTIONS, exemptions)
    if grpc:
        environment[_GRPC_EXEMPTION] = _joined(grpc, exempt)
    for name in ("MLPIPES_HOME", "DAGSTER_HOME"):
        if path := path_in(name):
            environment[name] = str(path)
    if uri := value_of("MLFLOW_TRACKING_URI"):
        environment["MLFLOW_TRACKING_URI"] = tracking_uri(uri)
    return environment


def apply() -> None:
    """Make this process one of ours. Raises ConfigError for a folder or an MLflow address that is none."""
    wanted = for_children()
    for name in set(os.environ) - set(wanted):
        del os.environ[name]
    os.environ.update({name: value for name, value in wanted.items() if os.environ.get(name) != value})


def _joined(given: str, more: list[str]) -> str:
    return ",".join(dict.fromkeys([*(host.strip() for host in given.split(",") if host.strip()), *more]))
