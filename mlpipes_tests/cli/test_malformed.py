"""Malformed files, keys and options: each is one clear error, in every command, and nothing is written."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlpipes.cli.app import app

KEYS = [
    *("", "w1", "w1-b8", "w1-b8-e1", "w1-b8-e1-g", "w0-b8-e1-g0", "w1-b0-e1-g0", "w1-b8-e0-g0", "w01-b8-e1-g0"),
    *(
        "w1-b8-e1-g0-c0",
        "w1-b8-e1-g0-c",
        "w1-b8-e1-g0-c1",
        "w1-b8-e1-g0.0",
        "w1-b8-e1-g-1",
        "W1-B8-E1-G0",
        "w1-b8-e1-g0 ",
    ),
    *("w1_b8_e1_g0", "w3-b8-e1-g0", "w1-b8-e1-g1.5", "w1-b8-e1-g9999", "w1-b8-e1-g0-c9999", "w1-b8-e1-g0.00001"),
    *("w1-b8-e1-g0/../x", "../../etc", "w٣-b8-e1-g0", "w1-b8-e1-g0\n", "w99999-b99999-e1-g0", "w1e1-b8-e1-g0"),
    "w1-b" + "9" * 5000 + "-e1-g0",
]
YAML = [  # that no file of ours is, whatever it is of
    *(
        "[",
        "{",
        "a: [",
        "a: b: c",
        "\t- x",
        "- a\n- b",
        "text",
        "1",
        "true",
        "a: 1\na: 2",
        "? [a]: b",
        "*x",
        "!!python/name:os.system x",
    ),
    *(
        "!!int abc",
        "2024-13-45",
        "a: 2024-13-45",
        "a: \x01",
        "[" * 2000,
        "a: !!binary xx",
        "<<: 1",
        "&a {b: *a}",
        "a: &a [1, [*a]]",
    ),
]
SCALES = [
    *YAML,
    *(
        "nope: [w1-b8-e1-g0]",
        "5: [w1-b8-e1-g0]",
        "digits: w1-b8-e1-g0",
        "digits: {}",
        "digits:",
        "digits: []",
        "digits: [1]",
    ),
    *(
        "digits: [[]]",
        "digits: [null]",
        "digits: [w1-b8-e1-g0, w1-b8-e1-g0]",
        "digits: [{workers: 1}]",
        "digits: [nope]",
    ),
    "digits: [{workers: 1, batch_size: 8, epochs: 1, gpus: 1}]",
    "digits: [{workers: '1', batch_size: 8, epochs: 1}]",
    "digits: [{workers: true, batch_size: 8, epochs: 1}]",
    "digits: [{workers: 3, batch_size: 8, epochs: 1}]",
    "digits: [{workers: 1, batch_size: 8, epochs: 1, gpus_per_worker: .nan}]",
    "digits: [{workers: 1, batch_size: 8, epochs: 1, cpus_per_worker: .inf}]",
    "digits: [{workers: 1, batch_size: 8, epochs: 1.5}]",
    "digits: [{workers: 1, batch_size: 8, epochs: " + "9" * 5000 + "}]",
    "digits: &a [*a]",
]
SLURM = [
    *YAML,
    *(
        "partitions: x",
        "time: 5",
        "time: soon",
        "time: 4 hours",
        "time: 4:00:00",
        "signal_seconds: 10",
        "signal_seconds: x",
    ),
    *("workers_per_node: 0", "memory: 64", "options: --exclusive", "options: [1]", "setup: {}", 'python: "\'unclosed"'),
    *(
        'command_prefix: "ssh \'x"',
        "poll_seconds: 0",
        "poll_seconds: -1",
        "poll_seconds: .nan",
        "resubmit_cancelled: perhaps",
    ),
    *(
        "scales: []",
        "scales: {w1-b8-e1-g0: 1}",
        "scales: {nope: {}}",
        "scales: {w1-b8-e1-g0: {nope: 1}}",
        "gpu_type: [a]",
    ),
]
SETTINGS = [
    *YAML,
    *(
        "nope: 1",
        "seed: x",
        "seed: '3'",
        "seed: 1.5",
        "seed: true",
        "seed:",
        "fresh: maybe",
        "fresh: 1",
        "keep_last: 0",
    ),
    *("stall_seconds: 0", "stall_seconds: -1", "min_workers: 0", "resize_seconds: 0", "checkpoint_every_seconds: 0"),
    *(
        "mean_seconds_between_failures: 0",
        "mean_seconds_between_failures: .inf",
        "mean_seconds_between_failures: often",
    ),
    *(
        "hyperparameters: []",
        "hyperparameters: x",
        "hyperparameters: {nope: 1}",
        "hyperparameters: {learning_rate: fast}",
    ),
    *(
        "hyperparameters: {learning_rate: 0}",
        "hyperparameters: {learning_rate: .nan}",
        "hyperparameters: {learning_rate: .inf}",
    ),
    *(
        "ops: {}",
        "ops: []",
        "ops: {digits__model: {}}",
        "ops: {digits__checkpoints: {}}",
        "ops: {digits__checkpoints: 1}",
    ),
    *("hyperparameters: &a {learning_rate: 0.1, width: *a}", "stall_seconds: .inf", "checkpoint_every_seconds: .inf"),
    *("seed: 1:30", "seed: 0b11", "hyperparameters: {width: 010}", "stall_seconds: 1_0.5"),
    *("ops: {digits__checkpoints: {config: 1}}", "ops: {digits__checkpoints: {config: {nope: 1}}}", "resources: {}"),
]
CHANGES = [
    *(
        "",
        "=",
        "x",
        "=1",
        "learning_rate=",
        "nope=1",
        "learning_rate=fast",
        "learning_rate=-1",
        "learning_rate=[",
        "seed=x",
    ),
    *(
        "learning_rate=.nan",
        "learning_rate=.inf",
        "keep_last=0",
        "hyperparameters=1",
        "fresh=maybe",
        "learning_rate=2024-13-45",
    ),
    *("width=1:30", "width=010", "width=0x10", "width=1_000", "learning_rate=1:30.5", "learning_rate=0o17"),
    *("network=nope", "learning_rate: 1", "learning_rate=true=1", "min_workers=0", "stall_seconds=.nan"),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the checkout: a command that does not fail would write Dagster's history there."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def fails(command: list[str], home: Path, *words: str) -> str:
    """A command's one error. It names what is wrong by these words, and the home folder stays what it was: not there."""
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, command)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), f"a traceback: {result.exception!r}"
    error = result.stderr
    assert error.startswith(("ConfigError: ", "ScaleError: ")), error
    assert "Traceback" not in error
    assert len(error) < 3000, "a page of it"
    for word in words:
        assert word in error, error
    assert not home.exists(), list(home.rglob("*"))
    return error


def file_with(content: str, tmp_path: Path) -> Path:
    path = tmp_path / "file.yaml"
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("key", KEYS, ids=range(len(KEYS)))
def test_a_malformed_key(key: str, isolated_home: Path) -> None:
    commands = (
        ["demo", "--workload", "digits", "--scale", key],
        ["backfill", "digits", "--scale", key],
        ["checkpoints", "digits", key],
        ["promote", "digits", key, "--reason", "a test"],
        ["compare", f"digits/{key}", "digits/w1-b128-e30-g0"],
        ["predict", "digits", key, "x"],
    )
    fails(commands[KEYS.index(key) % len(commands)], isolated_home)


@pytest.mark.parametrize("content", SCALES, ids=range(len(SCALES)))
def test_a_malformed_file_of_scales(
    content: str, tmp_path: Path, isolated_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file_with(content, tmp_path)
    monkeypatch.setenv("MLPIPES_SCALES", str(path))
    fails(["demo", "--workload", "digits"], isolated_home, str(path))


@pytest.mark.parametrize("content", SLURM, ids=range(len(SLURM)))
def test_malformed_settings_of_slurm(
    content: str, tmp_path: Path, isolated_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file_with(content, tmp_path)
    monkeypatch.setenv("MLPIPES_SLURM", str(path))
    fails(["demo", "--workload", "digits"], isolated_home, "lurm")


@pytest.mark.parametrize("content", SETTINGS, ids=range(len(SETTINGS)))
def test_malformed_settings_of_a_training(content: str, tmp_path: Path, isolated_home: Path) -> None:
    command = (["demo", "--workload", "digits"], ["backfill", "digits"])[SETTINGS.index(content) % 2]
    fails([*command, "--config", str(file_with(content, tmp_path))], isolated_home)


@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
def test_a_malformed_setting_on_the_command_line(change: str, isolated_home: Path) -> None:
    name = change.partition("=")[0].strip()
    fails(["demo", "--workload", "digits", "--set", change], isolated_home, name)


def test_a_setting_that_is_given_twice(isolated_home: Path) -> None:
    fails(["demo", "--set", "width=3", "--set", " width = 4"], isolated_home, "--set width: it is given twice")


def test_a_value_as_long_as_a_book_is_shown_in_its_first_letters(isolated_home: Path) -> None:
    assert len(fails(["demo", "--set", "width=" + "9" * 5000], isolated_home, "--set width: ")) < 500


def test_files_that_cannot_be_read(tmp_path: Path, isolated_home: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("network: é".encode("latin-1"))
    for path in (tmp_path, tmp_path / "none.yaml", tmp_path / "latin.yaml", "~nobody-here/x.yaml"):
        fails(["demo", "--config", str(path)], isolated_home, "--config", str(path))


def test_two_places_exclude_each_other(tmp_path: Path, isolated_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPIPES_RAY_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("MLPIPES_SLURM", str(file_with("", tmp_path)))
    fails(["demo"], isolated_home, "MLPIPES_RAY_ADDRESS", "MLPIPES_SLURM", "Unset one")


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "http://me:pl4nted@127.0.0.1:9/x"])
def test_an_mlflow_that_does_not_answer(uri: str, isolated_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert "pl4nted" not in fails(["demo"], isolated_home, "MLFLOW_TRACKING_URI", "nobody answers", "Start the server")


@pytest.mark.parametrize(
    "uri", ["postgresql+nodriver://me:pl4nted@127.0.0.1:9/db", "mssql://me:pl4nted@127.0.0.1:9/db"]
)
def test_an_mlflow_whose_driver_is_not_installed(
    uri: str, isolated_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert "pl4nted" not in fails(["demo"], isolated_home, "MLFLOW_TRACKING_URI", "driver", "not installed")


@pytest.mark.parametrize(
    "command", ["promote digits w1-b128-e30-g0 --reason x", "rollback digits --reason x", "release digits"]
)
def test_what_only_looks_at_models_makes_no_database(command: str, isolated_home: Path) -> None:
    fails(command.split(), isolated_home, "no model is registered yet", "Materialize `model` first")


def test_a_home_that_no_address_of_a_database_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPIPES_HOME", str(tmp_path / "why?"))
    fails(["demo"], tmp_path / "why?", "question mark", "MLPIPES_HOME")


def test_there_are_enough() -> None:
    assert sum(map(len, (KEYS, SCALES, SLURM, SETTINGS, CHANGES))) >= 180
