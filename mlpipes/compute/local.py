"""This machine's private Ray: on loopback, with its own ports, token and folder; it outlives the step that started it."""

import fcntl
import os
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from mlpipes.compute.address import RayAddress
from mlpipes.compute.jobs import environment_of_jobs
from mlpipes.compute.preflight import nodes_of
from mlpipes.compute.ray_node import (
    LOOPBACK,
    STARTED,
    end_marked,
    free_ports,
    short_folder,
    start_command,
    start_environment,
    temporary_files,
)
from mlpipes.compute.warm_driver import FOLDER_VARIABLE, start_ahead
from mlpipes.errors import ConfigError, CorruptionError, PreflightError, UserError
from mlpipes.store.environment import for_children
from mlpipes.store.files import read_record, write_atomic, write_record
from mlpipes.store.layout import home

_START_SECONDS, _TRIES = 300, 4
_USED: dict[Path, int] = {}
"""Descriptors of the shared locks by which others see that this process uses a cluster, by the cluster's folder."""
_PASSING: set[Path] = set()
"""Folders of the clusters that this process wants for itself alone."""
_GIVEN_UP: set[Path] = set()
"""Folders of the clusters that this process has released: what still runs in one of its threads is not to start another."""
_ONE_AT_A_TIME, _RELEASING = threading.Lock(), threading.Lock()


class LocalRay:
    """The private cluster of one home folder; at most one runs at a time."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or home() / "ray"
        self._state, self._passing = self.folder / "head.json", self.folder / "passing"

    def ensure(self, *, passing: bool = False) -> RayAddress:
        """The address of the running cluster; starts it if it does not run. Raises PreflightError if it cannot start.

        From now on this process uses it, until it ends or `release`s it. With `passing`, it is only for this process, and
        whoever else asks for it in that way meanwhile; once anybody has asked for it to stay, it does. After a release, only
        who asks with `passing` gets one again; for others, such as a thread that goes on while its process ends, UserError.
        """
        if passing:
            _PASSING.add(self.folder)
            _GIVEN_UP.discard(self.folder)
        self._check_wanted()
        self._use()
        with self._lock():
            self._check_wanted()
            state = self._read()
            if self.folder not in _PASSING:
                self._passing.unlink(missing_ok=True)
            if state is not None and self._answers(state):
                return self._address(state)
            if state is not None:
                self._end(state)
            if self.folder in _PASSING:
                self._passing.touch()
            return self._address(self._start())

    def status(self) -> dict[str, Any] | None:
        """What is known of the running cluster (`pid`, `dashboard`, …), or None if none runs."""
        state = self._read()
        return state if state is not None and self._answers(state) else None

    def died(self) -> bool:
        """Whether there was a cluster that nobody ended and that is gone all the same."""
        state = self._read()
        return state is not None and not _is_alive(state)

    def release(self, mine: Collection[str] = ()) -> bool:
        """End a passing cluster unless another process uses it, or a job runs in it that is not `mine`.

        Returns whether it was ended.
        """
        with _RELEASING:  # of two threads, the second finds what the first has left
            return self._release(mine)

    def _release(self, mine: Collection[str]) -> bool:
        descriptor = self._use()
        _GIVEN_UP.add(self.folder)  # where a folder can be made: what never was is not given up
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            with self._lock():
                pass  # a thread of this process that was just starting one has ended it
            # Who wants it now waits in `ensure`, and starts another.
            state = self.status()
            if state is None or not self._passing.exists() or self._jobs(state) - set(mine):
                return False
            return self.stop()
        finally:
            _PASSING.discard(self.folder)
            os.close(_USED.pop(self.folder))

    def stop(self) -> bool:
        """End the cluster and everything that runs in it; returns whether there was one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock():
            state = self._read()
            if state is None:
                return False
            self._end(state)
            self._passing.unlink(missing_ok=True)
            return True

    def _lock(self) -> FileLock:
        """Whoever starts or ends the cluster holds it."""
        return FileLock(str(self.folder / "lock"), timeout=2 * _START_SECONDS)

    def _check_wanted(self) -> None:
        if self.folder in _GIVEN_UP:
            raise UserError("this command ends, and has given its private Ray up; give it again to go on")

    def _use(self) -> int:
        """Have others see that this process uses the cluster; returns the descriptor of the shared lock."""
        with _ONE_AT_A_TIME:
            if self.folder not in _USED:
                self.folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.folder / "users.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                _USED[self.folder] = descriptor
            return _USED[self.folder]

    def _jobs(self, state: dict[str, Any]) -> set[str]:
        """The jobs that wait or run."""
        return {
            job.get("submission_id") or job.get("job_id", "")
            for job in self._ask(state).json()
            if job.get("status") in ("PENDING", "RUNNING") and job.get("type") == "SUBMISSION"
        }

    # -- start --------------------------------------------------------------------------------------------------------
    def _start(self) -> dict[str, Any]:
        # A node registers within 30 s, which cannot be set, or Ray gives up; a machine that is busy may need some tries,
        # though what took longest is waited for by `ray_start`.
        again = Retrying(retry=retry_if_exception_type(PreflightError), stop=stop_after_attempt(_TRIES), reraise=True)
        # Of a machine that is too busy, a warm process would take more; then the first job starts it.
        tries = count()
        return again(lambda: self._start_once(warm=next(tries) == 0))

    def _start_once(self, *, warm: bool) -> dict[str, Any]:
        token = self.folder / "token"
        if not token.is_file():
            write_atomic(token, secrets.token_hex(32).encode(), mode=0o600)
        token.chmod(0o600)
        temporary = short_folder("mlpipes-ray-")  # the home folder could be too deep
        (port, dashboard), mark = free_ports(2), secrets.token_hex(8)
        role = ["--head", f"--node-ip-address={LOOPBACK}", f"--port={port}"]
        role.append(f"--temp-dir={temporary / 'r'}")  # Ray lets everybody into the folder that it is given
        role += [f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard}"]
        command = start_command(role, os.cpu_count() or 1, head=True)
        # Without the user's token, which is another cluster's, and which Ray would prefer to ours.
        environment = for_children("RAY_AUTH_TOKEN") | self._client_environment() | start_environment(mark, LOOPBACK)
        environment |= temporary_files(temporary) | {FOLDER_VARIABLE: str(temporary)}
        state = {
            "pid": 0,
            "created": 0.0,
            "mark": mark,
            "dashboard": f"http://{LOOPBACK}:{dashboard}",
            "temporary": str(temporary),
        }
        # Written before there is a process: if we die now, the next caller finds what there is of it, and ends that.
        write_record(self._state, state)
        log = self.folder / "head.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        state["pid"], state["created"] = _identity(psutil.Process(process.pid))
        write_record(self._state, state)
        deadline = time.monotonic() + _START_SECONDS
        try:
            if warm:
                start_ahead(environment | environment_of_jobs(self.folder.parent, shares_machine=True))
            # The API answers a little before the node has registered; a preflight in between would see no CPU. Ray says that
            # it has started when the agent that runs jobs is there, too.
            while not (STARTED in log.read_text(errors="replace") and self._answers(state) and self._has_a_node(state)):
                self._check_wanted()
                if process.poll() is not None or time.monotonic() > deadline:
                    tail = log.read_text(errors="replace")[-2000:]
                    raise PreflightError(f"the local Ray did not start; its log {log} ends with:\n{tail}")
                time.sleep(0.1)
        except BaseException:
            self._end(state)
            raise
        state["raylet"] = _raylet_of(process.pid)
        write_record(self._state, state)
        return state

    def _has_a_node(self, state: dict[str, Any]) -> bool:
        try:
            return bool(nodes_of(self._address(state)))
        except PreflightError:  # parts of the dashboard come up one after the other
            return False

    def _client_environment(self) -> dict[str, str]:
        # Both explicit: without a mode, a stray ~/.ray/auth_token would switch tokens on for one side only.
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token")}

    def _address(self, state: dict[str, Any]) -> RayAddress:
        return RayAddress(state["dashboard"], self._client_environment(), local=True, lives=lambda: _is_alive(state))

    # -- state --------------------------------------------------------------------------------------------------------
    def _read(self) -> dict[str, Any] | None:
        try:
            return read_record(self._state)
        except (FileNotFoundError, CorruptionError):
            return None

    def _answers(self, state: dict[str, Any]) -> bool:
        """Whether it is our head that runs there (a port may be someone else's by now) and its Jobs API answers."""
        import requests

        if not _is_alive(state):
            return False
        try:
            return self._ask(state).ok
        except (requests.RequestException, ConfigError):
            return False

    def _ask(self, state: dict[str, Any]) -> Any:
        from requests import Session

        address = self._address(state)
        with Session() as session:
            session.trust_env = False  # no proxy, and nothing of ~/.netrc: this is loopback
            return session.get(f"{address.dashboard}/api/jobs/", headers=address.headers(), timeout=5)

    # -- end ----------------------------------------------------------------------------------------------------------
    def _end(self, state: dict[str, Any]) -> None:
        """End every process of a head."""
        # What a dead one leaves behind has nothing to put in order, and a training waits for the next one.
        end_marked(state["mark"], session=state["pid"], gently=_is_alive(state))
        shutil.rmtree(state["temporary"], ignore_errors=True)
        self._state.unlink(missing_ok=True)


def _identity(process: psutil.Process) -> tuple[int, float]:
    """A process's number and start: numbers are used again."""
    return process.pid, process.create_time()


def _raylet_of(head: int) -> tuple[int, float]:
    """The raylet among the children of a head; a process that there is never if it is gone already, or the head is."""
    with suppress(psutil.Error):
        for child in psutil.Process(head).children():
            with suppress(psutil.Error):  # the head has others, which come and go
                if child.name() == "raylet":
                    return _identity(child)
    return 0, 0.0


def _is_alive(state: dict[str, Any]) -> bool:
    """Whether a head's process and its raylet run.

    `ray start` stays when its raylet has ended by itself, as it does when one of its agents dies; then nothing can run there
    any more, and the Jobs API calls every job RUNNING for ever.
    """
    try:
        for pid, created in filter(None, ((state["pid"], state["created"]), state.get("raylet"))):
            process = psutil.Process(pid)
            if process.create_time() != created or process.status() == psutil.STATUS_ZOMBIE:
                return False
    except psutil.Error:
        return False
    return True
