"""The heap of a training: no page faults for memory that was there a step ago, and the user's own choice first."""

import os
import subprocess
import sys

import pytest

from mlpipes.training import heap

VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
PROGRAM = """
import random, resource, sys
import torch
from mlpipes.training.heap import keep_freed_memory

done, random = keep_freed_memory() if sys.argv[1] == "keep" else None, random.Random(0)
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
print(done, faults() - before)
"""


def _run(how: str, **environment: str) -> tuple[str, int]:
    bare = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    words = [sys.executable, "-c", PROGRAM, how]
    told = subprocess.run(words, env=bare | environment, check=True, capture_output=True, text=True).stdout.split()
    return told[0], int(told[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is needed")
def test_what_a_step_frees_is_there_for_the_next() -> None:
    """Without it, the same steps of varying sizes fault for pages that were theirs before."""
    (done, kept), (_, given_back) = _run("keep"), _run("default")
    assert done == "True"
    assert kept * 5 < given_back, (kept, given_back)  # seen: 1,728 and 60,000


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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is needed")
def test_an_empty_variable_and_tunables_for_something_else_are_no_choice() -> None:
    """As everywhere, empty is unset."""
    assert _run("keep", MALLOC_TRIM_THRESHOLD_="", GLIBC_TUNABLES="glibc.rtld.nns=4")[0] == "True"


def test_a_library_without_mallopt_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    assert not heap.keep_freed_memory()
