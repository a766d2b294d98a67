"""Nothing in the environment sends jobs, or a cluster's token, to another cluster than the one that is meant."""

import http.server
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlpipes.compute import local
from mlpipes.compute.address import RayAddress
from mlpipes.compute.local import LocalRay
from mlpipes.compute.preflight import nodes_of
from mlpipes.compute.ray_jobs import RayJobs
from mlpipes.compute.ray_node import short_folder, temporary_files
from mlpipes.errors import ConfigError, PreflightError, UserError
from mlpipes_tests.waiting import LIMIT_SECONDS, until


class Cluster:
    """Stands for a dashboard; notes who asks what, with which token."""

    def __init__(self) -> None:
        self.asked, self.jobs = list[tuple[str, str]](), list[dict[str, str]]()
        cluster = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                cluster.asked.append((self.path, self.headers.get("Authorization", "")))
                version = {"version": "4", "ray_version": "2", "ray_commit": "c", "session_name": "s"}
                body = json.dumps(version if "version" in self.path else cluster.jobs).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def tokens(self) -> set[str]:
        return {token for _, token in self.asked}


@pytest.fixture
def clusters(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cluster, Cluster, Cluster]]:
    """This machine's own, one that is given, and one that the environment is full of."""
    made = (Cluster(), Cluster(), Cluster())
    elsewhere = made[2].address
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, elsewhere)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")
    yield made
    for cluster in made:
        cluster.server.shutdown()
        cluster.server.server_close()


def test_jobs_and_tokens_go_where_they_are_meant_to(
    clusters: tuple[Cluster, Cluster, Cluster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, given, elsewhere = clusters
    (tmp_path / "token").write_text("our-own")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the-users")
    mine = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert RayJobs(RayAddress(own.address, mine, local=True)).latest("x") is None
    assert RayJobs(RayAddress(given.address)).latest("x") is None
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    assert RayJobs(RayAddress(given.address)).latest("x") is None
    assert elsewhere.asked == []
    assert own.tokens == {"Bearer our-own"}
    assert given.tokens == {"Bearer the-users", ""}, "without a token of the user's there is none"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN_PATH"):
        RayAddress(given.address).headers()


@pytest.mark.parametrize("place", ["HOME", "NETRC"])
def test_a_password_of_netrc_does_not_stand_in_for_the_token(
    place: str, clusters: tuple[Cluster, Cluster, Cluster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, given, _ = clusters
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password planted\ndefault login me password planted\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv(place, str(tmp_path if place == "HOME" else tmp_path / ".netrc"))
    (tmp_path / "token").write_text("our-own")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the-users")
    mine = RayAddress(
        own.address, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}, local=True
    )
    for address in (mine, RayAddress(given.address)):
        assert RayJobs(address).latest("x") is None
        with pytest.raises(PreflightError, match="does not answer"):  # what stands for a dashboard knows of no nodes
            nodes_of(address)
    assert own.tokens == {"Bearer our-own"}
    assert given.tokens == {"Bearer the-users"}
    assert {path.partition("?")[0] for path, _ in own.asked} == {"/api/version", "/api/jobs/", "/api/v0/nodes"}


# -- who ends the private Ray -----------------------------------------------------------------------------------------
class Pretended(LocalRay):
    """A private Ray without its processes: it is there once it was started."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.running: set[str] = set()

    def _start(self) -> dict[str, str]:
        (self.folder / "head").touch()
        return {"dashboard": "http://d"}

    def _read(self) -> dict[str, str] | None:
        return {"dashboard": "http://d"} if (self.folder / "head").exists() else None

    def _answers(self, state: dict[str, str]) -> bool:
        return True

    def _jobs(self, state: dict[str, str]) -> set[str]:
        return self.running

    def _end(self, state: dict[str, str]) -> None:
        (self.folder / "head").unlink()


OTHER = """import sys
from pathlib import Path
from mlpipes_tests.compute.test_redirects import Pretended
Pretended(Path(sys.argv[1])).ensure(passing=sys.argv[2] == "passing")
print("uses it", flush=True)
sys.stdin.read()
"""


def other(folder: Path, how: str) -> "subprocess.Popen[str]":
    """Another process that uses it."""
    command = [sys.executable, "-c", OTHER, str(folder), how]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "uses it\n"
    return process


def test_a_passing_ray_is_ended_by_the_last_that_uses_it(tmp_path: Path) -> None:
    ray = Pretended(tmp_path)
    ray.ensure(passing=True)
    ray.ensure()  # a step in the same process
    process = other(tmp_path, "passing")
    assert not ray.release(), "another command uses it"
    assert ray.status() is not None
    process.communicate()
    ray.ensure(passing=True)
    ray.running = {"mine", "another's"}
    assert not ray.release({"mine"}), "a job of somebody else runs in it"
    ray.ensure(passing=True)
    ray.running = {"mine"}
    assert ray.release({"mine"})
    assert ray.status() is None
    assert ray.folder not in local._USED


def test_two_threads_that_release_it_end_it_once(tmp_path: Path) -> None:
    ray = Pretended(tmp_path)
    ray.ensure(passing=True)
    ending, may_end, stop = threading.Event(), threading.Event(), ray.stop

    def slow_stop() -> bool:
        ending.set()
        assert may_end.wait(LIMIT_SECONDS)
        return stop()

    ray.stop = slow_stop
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ray.release)
        assert ending.wait(LIMIT_SECONDS)
        second = pool.submit(ray.release)
        with pytest.raises(TimeoutError):
            second.result(0.2)
        may_end.set()
        assert (first.result(LIMIT_SECONDS), second.result(LIMIT_SECONDS)) == (True, False)
    assert ray.folder not in local._USED


def test_a_ray_that_somebody_wants_to_stay_stays(tmp_path: Path) -> None:
    ray = Pretended(tmp_path)
    ray.ensure(passing=True)
    other(tmp_path, "for good").communicate()
    assert not ray.release()
    assert ray.status() is not None
    ray.ensure(passing=True)
    assert not ray.release(), "nor is one that was there before"
    assert ray.stop()


def test_what_goes_on_in_a_command_that_ends_starts_no_ray_again(tmp_path: Path) -> None:
    ray = Pretended(tmp_path)
    ray.ensure(passing=True)
    assert ray.release()
    with pytest.raises(UserError, match="this command ends"):
        ray.ensure()
    assert ray.status() is None
    ray.ensure(passing=True)
    ray.ensure()
    assert ray.release()


class Slow(Pretended):
    """One that is started for as long as it is wanted."""

    def _start(self) -> dict[str, str]:
        state = super()._start()
        try:
            while True:
                self._check_wanted()
                time.sleep(0.01)
        except UserError:
            self._end(state)
            raise


def test_a_ray_that_a_thread_is_starting_when_the_command_ends_is_ended(tmp_path: Path) -> None:
    ray, ends = Slow(tmp_path), list[BaseException]()

    def step() -> None:
        try:
            ray.ensure(passing=True)
        except UserError as error:
            ends.append(error)

    thread = threading.Thread(target=step)
    thread.start()
    until(lambda: ray.status() is not None, "it is being started")
    assert not ray.release()
    assert ray.status() is None, "whoever releases it waits until it is gone"
    thread.join()
    assert "this command ends" in str(ends[0])


# -- temporary folders ------------------------------------------------------------------------------------------------
def test_a_long_tmpdir_is_passed_over_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    for place, short in ((str(folder), False), ("/tmp", True)):
        monkeypatch.setattr(tempfile, "tempdir", place)
        made = short_folder("mlpipes-ray-")
        try:
            assert len(str(made)) <= 38
            assert stat.S_IMODE(made.stat().st_mode) == 0o700
            assert temporary_files(made) == {"TMPDIR": str(made)}, "what is killed leaves nothing elsewhere"
            assert temporary_files(Path("/dev/shm/made")) == ({} if short else {"TMPDIR": "/dev/shm/made"})
        finally:
            os.rmdir(made)  # noqa: PTH106
    assert not list(folder.iterdir())
