"""The end of a Ray node: also processes that have lost their mark, as Ray's agents do, and nobody else's."""

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mlpipes.compute.local import _raylet_of
from mlpipes.compute.ray_node import MARK, end_marked
from mlpipes_tests.sandbox import CHECKOUT

_NODE = """import subprocess, sys, time
for title in ("ray::Agent", "somebody"):
    made = subprocess.Popen([title, "-c", "import time; time.sleep(3600)"], executable=sys.executable, env={})
    print(made.pid, flush=True)
time.sleep(3600)"""


@pytest.fixture
def node() -> Iterator[tuple[str, psutil.Process, psutil.Process, psutil.Process]]:
    """A mark, a process that carries it, and two children that do not: an agent, by its title, and another."""
    mark = secrets.token_hex(8)
    head = subprocess.Popen(
        [sys.executable, "-c", _NODE], env={MARK: mark}, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert head.stdout is not None
    agent, other = (psutil.Process(int(head.stdout.readline())) for _ in range(2))
    yield mark, psutil.Process(head.pid), agent, other
    for process in (head, agent, other):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    head.wait()
    head.stdout.close()


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_children_without_a_mark_end_with_their_node(node: tuple[str, *tuple[psutil.Process, ...]]) -> None:
    mark, *processes = node
    end_marked(mark)
    assert all(map(is_gone, processes))


_ORDERLY = """import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit("asked"))
print(flush=True, file=sys.stderr)
time.sleep(3600)"""


def test_what_a_dead_node_has_left_is_not_asked_to_end() -> None:
    mark = secrets.token_hex(8)
    with subprocess.Popen([sys.executable, "-c", _ORDERLY], env={MARK: mark}, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        process.stderr.readline()
        end_marked(mark, gently=False)
        assert process.stderr.read() == b""


def test_a_node_whose_number_another_process_had_is_found(
    node: tuple[str, *tuple[psutil.Process, ...]],
) -> None:
    """psutil keeps what it has seen; its object of an earlier process has no children and cannot be ended."""
    mark, head, *_ = processes = node
    for seen in psutil.process_iter():  # noqa: TID251 - fills what it keeps
        if seen == head:
            seen._ident = (seen.pid, 0.0)  # pyright: ignore[reportAttributeAccessIssue] - as of one that started long ago
            assert not seen.is_running()
    psutil._pids_reused.clear()  # pyright: ignore[reportAttributeAccessIssue] - nobody has noticed yet
    end_marked(mark)
    assert all(map(is_gone, processes[1:]))


def test_agents_that_outlived_their_node_are_found_by_its_session(
    node: tuple[str, psutil.Process, psutil.Process, psutil.Process],
) -> None:
    mark, head, agent, other = node
    head.kill()
    head.wait(300)
    end_marked(mark)
    assert not is_gone(agent), "nothing but the session tells whose it is"
    end_marked(mark, session=head.pid)
    assert is_gone(agent)
    assert not is_gone(other), "a session's number may be that of somebody else's by then"


@pytest.mark.parametrize(
    ("comes_up_at", "starts", "code"), [(1, 1, 7), (2, 2, 7), (9, 3, 1)], ids=["at once", "the second time", "never"]
)
def test_a_node_that_did_not_come_up_is_started_again(comes_up_at: int, starts: int, code: int, tmp_path: Path) -> None:
    """One that came up and ended is not: its cluster has gone on without it."""
    tries = tmp_path / "tries"
    program = f"""import pathlib, sys
tries = pathlib.Path({str(tries)!r})
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
if len(tries.read_text()) < {comes_up_at}:
    sys.exit(1)
print("Ray runtime started.")
sys.exit(7)"""
    up = tmp_path / "up"
    hold = "import sys; from pathlib import Path; from mlpipes.compute.ray_node import _hold; "
    hold += "sys.exit(_hold([sys.executable, '-c', sys.argv[1]], {}, 'a mark', Path(sys.argv[2])))"
    # In a session of its own: between tries it ends what is called as Ray's processes are in its session, here the user's.
    held = subprocess.run([sys.executable, "-c", hold, program, str(up)], start_new_session=True, cwd=CHECKOUT)
    assert held.returncode == code
    assert len(tries.read_text()) == starts
    assert up.exists() == (code == 7), "whoever waits for it to come up"


class Child:
    """Stands for a child of a head."""

    def __init__(self, pid: int, name: str) -> None:
        self.pid, self._name = pid, name

    def name(self) -> str:
        if not self._name:
            raise psutil.NoSuchProcess(self.pid)
        return self._name

    def create_time(self) -> float:
        return 1.5


def test_the_raylet_is_found_whatever_other_children_of_a_head_do(monkeypatch: pytest.MonkeyPatch) -> None:
    children = [Child(5, ""), Child(6, "gcs_server"), Child(7, "raylet")]
    monkeypatch.setattr(psutil.Process, "children", lambda _: children)
    assert _raylet_of(os.getpid()) == (7, 1.5), "one ended while we looked"
    del children[2]
    assert _raylet_of(os.getpid()) == (0, 0.0)
