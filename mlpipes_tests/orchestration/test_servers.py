"""Servers as child processes: started again one by one, given up with the end of their log, ended with their parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from mlpipes.errors import ConfigError
from mlpipes.orchestration.servers import Server, ServerError, ServerLog

WAITS = "import sys; print('I serve', flush=True); sys.stdin.close(); import signal; signal.pause()"


def until(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:.0f} s it is not so that {what}"
        time.sleep(0.05)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[ServerLog]:
    opened = ServerLog(tmp_path / "logs" / "dev.log")
    yield opened
    opened.close()


def started(code: str, log: ServerLog) -> Server:
    return Server("The server", [sys.executable, "-c", code], os.environ, log)


def test_a_server_that_dies_is_started_again_and_it_is_said_how(log: ServerLog) -> None:
    server = started(WAITS, log)
    try:
        assert server.keep_up() is None
        server.process.kill()
        server.process.wait()
        before = server.process.pid
        assert server.keep_up() == "was killed by SIGKILL"
        assert server.process.pid != before
        assert server.keep_up() is None
        until(lambda: log.since(0).count(b"I serve") >= 1, "the second one has printed")
    finally:
        server.end()
    assert server.process.returncode is not None


def test_a_server_that_keeps_dying_is_given_up_with_the_end_of_its_log(log: ServerLog) -> None:
    log.stream.write(b"of another server\n")
    server = started("print('\\x1b[31mno disk\\x1b[0m'); raise SystemExit(3)", log)
    restarts = 0
    with pytest.raises(ServerError, match="ended with exit code 3, 3 times right after its start") as caught:
        while True:
            server.process.wait()
            restarts += server.keep_up() is not None
    assert restarts == 2
    assert str(log.path) in str(caught.value)
    assert str(caught.value).endswith("\nno disk"), "the end of its own log, without colours"
    assert log.since(0).count(b"no disk") == 3, "the log has it all"


def test_the_log_of_the_session_before_is_kept(tmp_path: Path) -> None:
    for text in (b"first", b"second", b"third"):
        log = ServerLog(tmp_path / "dev.log")
        log.stream.write(text)
        log.close()
    assert (tmp_path / "dev.log").read_bytes() == b"third"
    assert (tmp_path / "dev.previous.log").read_bytes() == b"second"
    assert len(list(tmp_path.iterdir())) == 2


def test_all_that_is_new_is_shown_once(log: ServerLog, capsys: pytest.CaptureFixture[str]) -> None:
    log.stream.write(b"one\n")
    log.show()
    log.stream.write(b"two\n")
    log.show()
    log.show()
    assert capsys.readouterr().out == "one\ntwo\n"


def test_a_log_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(ConfigError, match=r"the servers' log .* cannot be written"):
        ServerLog(tmp_path / "logs" / "dev.log")


@pytest.mark.skipif(sys.platform != "linux", reason="by the kernel of Linux")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_servers_end_with_their_parent_however_it_dies(tmp_path: Path, how: signal.Signals) -> None:
    parent_code = (
        "import os, pathlib, signal, sys; from mlpipes.orchestration.servers import Server, ServerLog; "
        f"log = ServerLog(pathlib.Path({str(tmp_path / 'dev.log')!r})); "
        f"print(Server('server', [sys.executable, '-c', {WAITS!r}], os.environ, log).process.pid, flush=True); "
        "signal.pause()"
    )
    parent = subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    try:
        # Before that, Python might not have installed its handler of SIGINT, nor the kernel been told.
        until(lambda: b"I serve" in (tmp_path / "dev.log").read_bytes(), "the server runs")
        parent.send_signal(how)
        parent.wait()
        until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the server has ended, too")
    finally:
        parent.kill()
        parent.wait()
        if child.is_running():
            child.kill()
        parent.stdout.close()
