"""`mlpipes new`: a package that can be installed, or one clear error and nothing written."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlpipes.cli import new
from mlpipes.cli.app import app
from mlpipes_tests.sandbox import CHECKOUT

FILES = [
    "README.md",
    "pyproject.toml",
    "src/churn/__init__.py",
    "src/churn/entry.py",
    "src/churn/workload.py",
    "tests/test_churn.py",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the command is called."""
    made = tmp_path / "here"
    made.mkdir()
    monkeypatch.chdir(made)
    return made


def run(*command: str) -> str:
    """What it prints, and its exit code."""
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["new", *command])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return f"{result.exit_code}: {result.output}"


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("kind", "more"), [("tabular", []), ("image-folder", ["tests/conftest.py"])])
def test_a_package_is_written(folder: Path, kind: str, more: list[str]) -> None:
    assert run("churn", "--kind", kind).startswith(f"0: {folder / 'churn'} is written.")
    assert files_in(folder / "churn") == sorted(FILES + more)
    assert [path.name for path in folder.iterdir()] == ["churn"], "no draft is left"
    assert (folder / "churn").stat().st_mode == (folder.stat().st_mode), "others may read it, too"
    for command in (["check", "--select", "E,F,I,UP,B,PT"], ["format", "--check"]):
        linted = [sys.executable, "-m", "ruff", *command, "--isolated", "--line-length", "120", "churn"]
        done = subprocess.run(linted, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_next_steps_name_the_programs_of_this_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(sys.executable).parent
    monkeypatch.setenv("PATH", str(here))  # it is activated
    assert "  python -m pip install -e first\n  mlpipes demo --workload first\n" in run("first")
    monkeypatch.setenv("PATH", "/nowhere")
    steps = f"  {here}/python -m pip install -e second\n  export SECOND_IMAGES=/path/to/images\n  {here}/mlpipes demo"
    assert steps in run("second", "--kind", "image-folder")
    monkeypatch.setattr(sys, "executable", str(folder / ".venv" / "bin" / "python"))
    assert "  .venv/bin/python -m pip install -e third\n  .venv/bin/mlpipes demo --workload third\n" in run("third")


def test_a_name_of_several_words_is_one_name(folder: Path) -> None:
    assert run("who_leaves", "--kind", "image-folder").startswith("0: ")
    text = (folder / "who_leaves" / "src" / "who_leaves" / "workload.py").read_text()
    assert "\nwho_leaves = ImageClassification(" in text
    assert 'ImageFolder("$WHO_LEAVES_IMAGES"' in text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("who-leaves", "'who-leaves' is no name for a workload"),
        ("1st", "'1st' is no name for a workload"),
        ("größe", "'größe' is no name for a workload"),
        ("../churn", "'../churn' is no name for a workload"),
        ("", "'' is no name for a workload"),
        ("class", "'class' is a word of Python's own"),
        ("digits", "there is a workload 'digits' already"),
        ("json", "Python has a module 'json' already"),
        ("torch", "Python has a module 'torch' already"),
    ],
)
def test_a_name_that_cannot_be_is_one_clear_error(folder: Path, name: str, said: str) -> None:
    assert run(name).startswith(f"1: ConfigError: {said}")
    assert list(folder.parent.rglob("churn")) == list(folder.iterdir()) == []


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_what_is_there_stays_as_it_is(folder: Path, what: str) -> None:
    target = folder / "churn"
    match what:
        case "folder":
            target.mkdir()
            (target / "README.md").write_text("mine")
        case "file":
            target.write_text("mine")
        case "link":
            target.symlink_to("nowhere")
    assert run("churn").startswith(f"1: ConfigError: {target} is there already, and nothing in it was changed")
    assert files_in(folder) == {"folder": ["churn/README.md"], "file": ["churn"], "link": []}[what]


def test_a_folder_that_comes_up_meanwhile_stays_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        target.mkdir()
        (target / "README.md").write_text("mine")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    assert "churn cannot be written: Directory not empty" in run("churn")
    assert files_in(folder) == ["churn/README.md"]
    assert (folder / "churn" / "README.md").read_text() == "mine"


def test_an_interruption_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        new.write_package(folder / "churn", "churn", new.Kind.TABULAR)
    assert list(folder.iterdir()) == []


def test_the_templates_and_dagsters_settings_are_in_the_wheel(folder: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, folder)
    shutil.copytree(CHECKOUT / "mlpipes", folder / "mlpipes", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "."], check=True, env=os.environ | {"PYTHONPATH": ""})
    (wheel,) = folder.glob("*.whl")
    templates = {path for path in files_in(folder) if path.startswith("mlpipes/cli/templates/")}
    assert len(templates) > 6
    assert {*templates, "mlpipes/orchestration/dagster.yaml"} <= set(zipfile.ZipFile(wheel).namelist())
