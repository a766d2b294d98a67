"""The layers: import-linter's contracts (pyproject.toml) hold, and notice what breaks them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlpipes_tests.sandbox import CHECKOUT


def lint(folder: Path) -> "subprocess.CompletedProcess[str]":
    """Check the packages in a folder, which comes first on the path, against the contracts of its pyproject.toml."""
    code = (
        "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command; lint_imports_command()"
    )
    return subprocess.run([sys.executable, "-c", code, "--no-cache"], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("mlpipes", "mlpipes_tests"):
        shutil.copytree(CHECKOUT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "output"))
    shutil.copy(CHECKOUT / "pyproject.toml", tmp_path)
    return tmp_path


def test_every_arrow_points_down() -> None:
    done = lint(CHECKOUT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("store/lease.py", "from mlpipes.training.checkpoints import Checkpoints", "every arrow points down"),
        ("compute/jobs.py", "from mlpipes.training.driver import main", "every arrow points down"),
        ("data/ragged.py", "from mlpipes.data.dataset import Dataset", "no circle"),
        ("evaluation/gates.py", "import dagster", "only orchestration and the definitions import Dagster"),
        ("store/files.py", "from mlpipes_tests.sandbox import CHECKOUT", "the package never imports its tests"),
    ],
)
def test_a_wrong_import_is_noticed_inside_a_function_too(copy: Path, module: str, line: str, broken: str) -> None:
    with (copy / "mlpipes" / module).open("a") as stream:
        stream.write(f"\n\ndef wrong() -> None:\n    {line}\n")
    done = lint(copy)
    assert done.returncode == 1, done.stdout + done.stderr
    assert any(broken in text and "BROKEN" in text for text in done.stdout.splitlines()), done.stdout


def test_a_new_package_must_be_given_its_floor(copy: Path) -> None:
    (copy / "mlpipes" / "attic").mkdir()
    (copy / "mlpipes" / "attic" / "__init__.py").touch()
    done = lint(copy)
    assert done.returncode == 1, done.stdout
    assert "attic" in done.stdout
