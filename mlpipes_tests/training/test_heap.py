"""The heap of a training: no page faults for memory that was there a step ago, and the user's own choice first."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mlpipes.training import heap

VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
PROGRAM = """
import random, resource, sys
import torch
from mlpipes.training.determinism import prepare_process

if sys.argv[1] == "train":
    prepare_process(1, 0)
random = random.Random(0)
def step():
    tensors = [torch.ones(random.randrange(1 << 16, 1 << 20)) for _ in range(40)]  # 80 MiB, other sizes each time
    random.shuffle(tensors)
    while tensors:
        tensors.pop()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
before = faults()
for _ in range(20):
    step()
print(faults() - before)
"""


def _faults(how: str) -> int:
    bare = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    words = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(words, env=bare, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is needed")
def test_what_a_step_frees_is_there_for_the_next() -> None:
    """In a process that was not prepared, the same steps of varying sizes fault for pages that were theirs before."""
    kept, given_back = _faults("train"), _faults("default")
    assert kept * 5 < given_back, (kept, given_back)  # seen: 1,564 and 43,915


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "65536"),
        ("MALLOC_MMAP_THRESHOLD_", "65536"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=65536"),
    ],
)
def test_the_users_own_choice_is_left_alone(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has chosen thresholds by glibc's own variables keeps them."""
    for other in VARIABLES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: pytest.fail("asked for glibc"))
    monkeypatch.setenv(name, value)
    assert not heap.keep_freed_memory()


def test_an_empty_variable_and_tunables_for_something_else_are_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """As everywhere, empty is unset."""
    asked: list[tuple[int, int]] = []
    glibc = SimpleNamespace(mallopt=lambda *option: asked.append(option) or 1)
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: glibc)
    for name, value in zip(VARIABLES, ("", "", "glibc.rtld.nns=4"), strict=True):
        monkeypatch.setenv(name, value)
    assert heap.keep_freed_memory()
    assert asked == [(-3, 32 << 20), (-1, 64 << 20)]


def test_a_library_without_mallopt_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    assert not heap.keep_freed_memory()
