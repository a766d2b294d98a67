"""The environment: one table, bad values named, nothing redirected, loopback without a proxy."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlpipes.cli.app import app
from mlpipes.errors import ConfigError
from mlpipes.store import environment
from mlpipes.store.environment import TABLE, Fate, for_children, tracking_uri, value_of
from mlpipes_tests.test_pages import documented

MINE, OTHERS = "Environment variables of mlpipes", "Variables of other programs that matter"
OWN = "Variables that mlpipes sets for its own processes"
DROPPED = "Variables that are dropped"
NOT_AN_ADDRESS = (
    "localhost",
    "ftp://host",
    "http://",
    "http://host:port",
    "http://host:99999",
    "http://[::1",
    "http://a b",
    "httpx://host",
    "http://host:0",
    "http://host\x7f",
)
NO_SECONDS = ("soon", "0", "-1", "1.5", "1e3", "٣")
NO_SWITCH, NO_PRICE = ("maybe", "2", "y e s"), ("free", "-1", "nan", "inf", "1,50", "1e999", "٣", "1_0")
NO_PROXY_ = ("http://", "http://proxy:port", "ftp://proxy:1", "http://[::1")
NO_FILE = ("/nowhere/at/all", "~nobody-here/x", "/", "../not/there.yaml")
NO_FOLDER = ("/dev/null", "/dev/null/x", "~nobody-here/x")
BAD: dict[str, tuple[str, ...]] = {
    "MLPIPES_HOME": (*NO_FOLDER, "http://host/home", "s3://bucket/home", "$HOME/x", "a/${NOWHERE}/b"),
    "MLPIPES_SCALES": NO_FILE,
    "MLPIPES_RAY_ADDRESS": (*NOT_AN_ADDRESS, "ray://head:10001", "auto", "head:6379"),
    "MLPIPES_SLURM": NO_FILE,
    "MLPIPES_KUBERNETES": NO_FILE,
    "MLPIPES_CIFAR10": NO_FOLDER,
    "MLPIPES_SST2": NO_FOLDER,
    "MLPIPES_SST2_MODEL": (" bert-base-uncased", "bert\n"),
    "MLPIPES_VIDEOS": ("/nowhere/at/all", "/dev/null"),
    "MLPIPES_INPUTS": ("/nowhere/at/all", "/dev/null"),
    "MLPIPES_NIGHTLY": ("banana", "* * *", "0 2 * * * *", "@nightly", "2 o'clock"),
    "MLPIPES_NIGHTLY_TIMEZONE": ("Berlin", "Europe/Nowhere", "../etc/passwd", "Europe", "/etc/localtime"),
    "MLPIPES_WEBHOOK": NOT_AN_ADDRESS,
    "MLPIPES_SERVE_TOKEN": (
        "short",
        "with blanks, and long enough",
        "line\nbreaks-are-not-sent",
        "ümlaute-werden-nicht-gesendet",
    ),
    "MLPIPES_GPU_HOUR": NO_PRICE,
    "MLPIPES_CPU_HOUR": NO_PRICE,
    "MLPIPES_DAGSTER_UI": NOT_AN_ADDRESS,
    "MLPIPES_MLFLOW_UI": NOT_AN_ADDRESS,
    "MLFLOW_TRACKING_URI": (
        *(
            "mlruns",
            "./mlruns",
            "file:///mlruns",
            "file:mlruns",
            "ftp://host",
            "http://",
            "http://host:port",
            "sqlite://",
        ),
        *("sqlite:///", "sqlite:///:memory:", "sqlite:////", "sqlite:////dev", "postgresql://", "oracle://host/db"),
        *("sqlite+foo:///x.db", "sqlite:////dev/null/x/y.db"),
        *("sqlite:///~nobody-here/x.db", "databricks", "databricks://x"),
    ),
    "MLFLOW_TRACKING_USERNAME": (" me",),
    "MLFLOW_TRACKING_PASSWORD": ("secret\n",),
    "MLFLOW_TRACKING_TOKEN": ("secret\n",),
    "MLFLOW_S3_ENDPOINT_URL": NOT_AN_ADDRESS,
    "AWS_ACCESS_KEY_ID": ("secret ",),
    "AWS_SECRET_ACCESS_KEY": ("secret ",),
    "AWS_SESSION_TOKEN": ("\nsecret",),
    "MLFLOW_LOGGING_LEVEL": ("loud", "1"),
    "MLFLOW_DISABLE_TELEMETRY": NO_SWITCH,
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": NO_SWITCH,
    "KUBECONFIG": (" config", "config\n"),
    "DAGSTER_HOME": ("/nowhere/at/all", "~nobody-here/x", "/dev/null"),
    "DAGSTER_EVENT_LOG_CONSUMER_DAEMON_INTERVAL_SECONDS": NO_SECONDS,
    "DAGSTER_GRPC_TIMEOUT_SECONDS": NO_SECONDS,
    "DAGSTER_GRPC_PROXY_HEARTBEAT_TTL_SECONDS": NO_SECONDS,
    "MLFLOW_HTTP_REQUEST_TIMEOUT": NO_SECONDS,
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": ("few", "-1", "10", "1.5", "٣"),
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": NO_SWITCH,
    "HF_HUB_OFFLINE": NO_SWITCH,
    "HF_HUB_DISABLE_PROGRESS_BARS": NO_SWITCH,
    "HF_HOME": NO_FOLDER,
    "HF_ENDPOINT": NOT_AN_ADDRESS,
    "HF_TOKEN": ("secret ",),
    **dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"), NO_PROXY_),
    "RAY_AUTH_MODE": ("yes", "tokens"),
    "RAY_AUTH_TOKEN": ("secret\n", " secret"),
    "RAY_AUTH_TOKEN_PATH": NO_FILE,
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": ("soon", "0", "0.0", "-1", "1e3", "1,5", "٣"),
    "GLOO_SOCKET_IFNAME": ("no-such-interface", "lo,nope"),
    "CUDA_VISIBLE_DEVICES": ("all", "0;1", "0,,1", "cuda:0"),
    "CUBLAS_WORKSPACE_CONFIG": ("4096", ":0:0", "off"),
    "TMPDIR": ("/nowhere/at/all", "/dev/null"),
    **dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), ("much", "-1", "1.5", "1 GiB", "٣")),
    "GLIBC_TUNABLES": (" glibc.malloc.trim_threshold=1",),
}
CASES = [(name, value) for name, values in BAD.items() for value in values]
"""Commands that read, that make something, and that start servers."""
COMMANDS = (["scales"], ["status"], ["demo", "--workload", "digits"], ["dev", "--port", "39997"], ["ray", "up"])


def listing(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_bad_value_is_one_clear_error_and_nothing_is_written(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(tmp_path)
    command = COMMANDS[CASES.index((name, value)) % len(COMMANDS)]
    monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), "a traceback"
    error = result.stderr
    assert error.startswith(f"ConfigError: {name}"), error
    assert error.count("ConfigError") == 1
    assert "Traceback" not in error
    if TABLE[name].secret:
        assert "secret" not in error
    assert any(word in error for word in ("write", "use ", "name ", "remove", "unset", "such as", "are ", "with")), (
        "no remedy"
    )
    assert listing(tmp_path) == before


def test_there_is_a_bad_value_for_every_variable_that_is_kept() -> None:
    assert set(BAD) == {name for name, variable in TABLE.items() if variable.fate is Fate.KEPT}
    assert len(CASES) >= 130


def test_the_documented_variables_are_those_of_the_table_with_their_fates() -> None:
    of_slurm = {"SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_CPUS_PER_TASK", "SLURM_RESTART_COUNT"}
    of_children = {"MLFLOW_BACKEND_STORE_URI"}
    fates = {fate: {name for name, variable in TABLE.items() if variable.fate is fate} for fate in Fate}
    assert documented(MINE, OTHERS) == fates[Fate.KEPT]
    assert documented(OWN) - of_slurm - of_children == fates[Fate.PINNED] | {"RAY_ADDRESS"}
    assert documented(DROPPED) == fates[Fate.DROPPED]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MLPIPES_NIGHTLY", "0 2 * * 1-5"),
        ("MLPIPES_NIGHTLY", "@daily"),
        ("MLPIPES_NIGHTLY_TIMEZONE", "Europe/Berlin"),
        ("MLPIPES_RAY_ADDRESS", "https://head/dashboard"),
        ("MLPIPES_RAY_ADDRESS", "http://[::1]:8265"),
        ("MLPIPES_HOME", "~/a b/100%/nöch"),
        ("MLFLOW_TRACKING_URI", "postgresql+psycopg2://me:p%40ss@host:5432/db"),
        ("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db"),
        ("http_proxy", "proxy:3128"),
        ("HTTPS_PROXY", "socks5h://me:secret@proxy:1080"),
        ("HF_HUB_OFFLINE", "TRUE"),
        ("CUDA_VISIBLE_DEVICES", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,1"),
        ("GLOO_SOCKET_IFNAME", "lo"),
        ("MLPIPES_GPU_HOUR", "0"),
    ],
)
def test_a_good_value_is_taken(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert value_of(name) == value


def test_empty_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BAD:
        monkeypatch.setenv(name, "")
        assert value_of(name) is None


def test_what_would_send_us_elsewhere_is_dropped_and_what_is_ours_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, variable in TABLE.items():
        if variable.fate is not Fate.KEPT:
            monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "theirs")
    monkeypatch.setenv("UNHEARD_OF", "kept")
    found = for_children()
    assert not {name for name, variable in TABLE.items() if variable.fate is Fate.DROPPED} & set(found)
    assert (found["RAY_TRAIN_V2_ENABLED"], found["RAY_USAGE_STATS_ENABLED"]) == ("1", "0")
    assert (found["RAY_AUTH_TOKEN"], found["UNHEARD_OF"]) == ("theirs", "kept")
    assert "RAY_AUTH_TOKEN" not in for_children("RAY_AUTH_TOKEN")


def test_no_proxy_stands_before_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "intranet, example.org")
    monkeypatch.setenv("no_grpc_proxy", "other")
    found = for_children(unproxied="10.0.0.7")
    assert found["no_proxy"] == found["NO_PROXY"] == "intranet,example.org,localhost,127.0.0.1,::1,10.0.0.7"
    assert found["no_grpc_proxy"] == "other,localhost,127.0.0.1,::1,10.0.0.7"
    assert found["http_proxy"] == "http://127.0.0.1:9"
    assert "http" in requests.utils.get_environ_proxies("http://127.0.0.1:8265/api")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, found[name])
    assert not requests.utils.get_environ_proxies("http://127.0.0.1:8265/api")
    assert requests.utils.get_environ_proxies("http://mlflow.example.com")
    monkeypatch.delenv("no_grpc_proxy")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "*")
    found = for_children()
    assert found["no_proxy"] == found["NO_PROXY"] == "*", "before no host; as one of several names, it would be none"
    assert found["no_grpc_proxy"] == "*,localhost,127.0.0.1,::1"
    assert not requests.utils.get_environ_proxies("http://mlflow.example.com")


def test_folders_and_files_are_absolute_for_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "d").mkdir()
    monkeypatch.setenv("MLPIPES_HOME", "~/h")
    monkeypatch.setenv("DAGSTER_HOME", "d")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db?timeout=5")
    found = for_children()
    assert found["MLPIPES_HOME"] == f"{tmp_path}/h"
    assert found["DAGSTER_HOME"] == f"{tmp_path}/d"
    assert found["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow.db?timeout=5"
    assert tracking_uri("sqlite:///~/x.db") == f"sqlite:///{tmp_path}/x.db"
    assert tracking_uri("http://host:5000") == "http://host:5000"


def test_a_process_becomes_one_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.os, "environ", dict(os.environ))
    os.environ["RAY_ADDRESS"] = "http://elsewhere:8265"
    environment.apply()
    assert "RAY_ADDRESS" not in os.environ
    assert "127.0.0.1" in os.environ["no_proxy"].split(",")
    with pytest.raises(ConfigError, match="MLPIPES_HOME=/dev/null"):
        os.environ["MLPIPES_HOME"] = "/dev/null"
        environment.apply()


def test_a_name_that_is_nearly_one_of_ours_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLPIPES_HOMES", "MLPIPES_NIGTHLY", "MLPIPES_REAL_DATA", "MLPIPES_UNHEARD_OF"):
        monkeypatch.setenv(name, "1")
    told = [
        f"{name} is no variable of mlpipes, and has no effect. Is {meant} meant?"
        for name, meant in (("MLPIPES_HOMES", "MLPIPES_HOME"), ("MLPIPES_NIGTHLY", "MLPIPES_NIGHTLY"))
    ]
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["scales"])
    assert (result.exit_code, result.stderr.splitlines()) == (0, told)
    assert "no effect" not in result.stdout


@pytest.mark.parametrize("command", [["store", "--adopt"], ["ray", "up"], ["demo", "--workload", "digits"]])
@pytest.mark.parametrize("place", ["/proc/nowhere/home", "link/home", "link"])
def test_a_home_that_cannot_be_made_is_one_clear_error(
    place: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions would allow it: only the attempt shows that a kernel's file system, or a link to nothing, does not."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # not in the checkout, which has a dagster.yaml
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    before, home = listing(tmp_path), tmp_path / place  # of an absolute place, that place
    monkeypatch.setenv("MLPIPES_HOME", str(home))
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, command)
    assert (result.exit_code, type(result.exception)) == (1, SystemExit), result.exception
    assert result.stderr.startswith(f"ConfigError: MLPIPES_HOME={home}: the folder cannot be made ("), result.stderr
    assert "name one that you may write to" in result.stderr
    assert listing(tmp_path) == before
