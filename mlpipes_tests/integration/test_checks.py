"""Format, lint, types and definitions: checks of the whole tree, which need one core each, beside the other tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlpipes_tests.sandbox import CHECKOUT

CHECKS = {
    "types": "pyright",
    "definitions": "dagster definitions validate -w workspace.yaml",
    "lint": "ruff check .",
    "format": "ruff format --check .",
}
"""As in the Makefile, where each is a target of its own."""


@pytest.mark.parametrize("check", CHECKS)
def test_the_tree_passes(check: str, tmp_path: Path) -> None:
    program, *arguments = CHECKS[check].split()
    home = {"DAGSTER_HOME": str(tmp_path), "MLPIPES_HOME": str(tmp_path)} if check == "definitions" else {}
    done = subprocess.run(
        [str(Path(sys.executable).with_name(program)), *arguments],
        cwd=CHECKOUT,
        env=os.environ | home,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_the_makefile_says_the_same() -> None:
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    for command in CHECKS.values():
        assert f"\t$(BIN)/{command}\n" in makefile
