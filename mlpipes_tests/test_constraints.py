"""What is pinned: images are made of the files of the versions that the tests run with."""

import re
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mlpipes_tests.sandbox import CHECKOUT

PINNED = dict(line.split("==") for line in (CHECKOUT / "constraints.txt").read_text().split())
VERSIONS = {canonicalize_name(name): version for name, version in PINNED.items()}
HASHES = sorted((CHECKOUT / "deploy" / "docker" / "hashes").glob("*.txt"))


@pytest.mark.parametrize("path", HASHES, ids=lambda path: path.stem)
def test_files_of_images_are_those_of_the_pinned_versions(path: Path) -> None:
    """Were this to fail: `make hashes`."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    found = [re.fullmatch(r"(\S+)==(\S+) --hash=sha256:[0-9a-f]{64}", line) for line in lines]
    listed = {canonicalize_name(match[1]): match[2] for match in found if match}
    assert len(listed) == len(lines), "each has a digest, and comes once"
    assert listed == {name: VERSIONS.get(name) for name in listed}


@pytest.mark.parametrize("path", HASHES, ids=lambda path: path.stem)
def test_files_of_images_are_all_that_is_required(path: Path) -> None:
    listed = {canonicalize_name(line.partition("==")[0]) for line in path.read_text().splitlines() if "==" in line}
    required = {"mlpipes"}
    todo: list[tuple[str, tuple[str, ...]]] = [("mlpipes", ("kubernetes", "minilm"))]
    seen = set(todo)
    while todo:
        name, extras = todo.pop()
        for text in distribution(name).requires or []:
            requirement = Requirement(text)
            environments = [{"extra": extra} for extra in (*extras, "")]
            if requirement.marker is not None and not any(requirement.marker.evaluate(e) for e in environments):
                continue
            other = canonicalize_name(requirement.name)
            required.add(other)
            if (further := (other, tuple(sorted(requirement.extras)))) not in seen:
                seen.add(further)
                todo.append(further)
    assert required - {"mlpipes"} <= listed
