"""Drivers forked from a warm process: like processes of their own, for themselves and for whoever looks at them."""

import fcntl
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlpipes.compute import warm_driver, warm_process
from mlpipes.compute.processes import kill, with_variable
from mlpipes.compute.ray_node import MARK
from mlpipes.compute.stacks import keep_stacks, processes_of
from mlpipes.compute.warm_driver import FOLDER_VARIABLE
from mlpipes.compute.warm_process import Request, WarmProcess
from mlpipes_tests.sandbox import CHECKOUT
from mlpipes_tests.waiting import LIMIT_SECONDS, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")


_MASKED = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGUSR1])
os.execv(sys.argv[1], sys.argv[1:])
"""


class Place:
    """Where the files of a private Ray would be, and drivers beside it."""

    def __init__(self, folder: Path, files: Path) -> None:
        self.folder, self.files, self.mark = folder, files, f"test-{files}"

    def start(self, name: str, *end: str, **environment: str) -> "subprocess.Popen[str]":
        """A driver under a name, which is its fingerprint, too."""
        return subprocess.Popen(
            self.command(name, *end),
            cwd=self.files,
            env=self.environment(name) | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def command(self, name: str, *end: str) -> list[str]:
        """A driver's command line."""
        module = "mlpipes_tests.compute.driver_subject"
        return [sys.executable, "-m", "mlpipes_tests.compute.patient_driver", module, str(self.files / name), *end]

    def environment(self, name: str) -> dict[str, str]:
        """A driver's environment."""
        known = {FOLDER_VARIABLE: str(self.folder), MARK: self.mark, "MLPIPES_FINGERPRINT": name}
        return os.environ | {"PYTHONPATH": str(CHECKOUT)} | known

    def told(self, name: str) -> dict[str, Any]:
        """What a driver has found; waits for it."""
        until((self.files / name).is_file, f"{name} has told what it finds")
        return json.loads((self.files / name).read_text())

    def run(self, name: str, *end: str, **environment: str) -> tuple[int, str, str, dict[str, Any]]:
        """A driver to its end: exit code, output, errors, and what it found."""
        process = self.start(name, *end, **environment)
        output, errors = process.communicate(timeout=LIMIT_SECONDS)
        return process.returncode, output, errors, self.told(name)

    def close(self) -> None:
        """End whatever there is."""
        kill(with_variable(MARK, self.mark))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """One with no warm process yet."""
    with tempfile.TemporaryDirectory(prefix="warm-") as folder:
        made = Place(Path(folder), tmp_path)
        try:
            yield made
        finally:
            made.close()


def alive(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def test_drivers_are_forked_and_look_like_processes_of_their_own(place: Place) -> None:
    code, output, errors, first = place.run("one", "exit", "3", MLPIPES_TEST="a")
    assert (code, output, errors) == (3, "to output by one\n", "to errors by one\n")
    assert first["warm"]
    assert first["collects"]
    assert first["never_collected"] > 100_000, "no garbage is looked for among what was imported before the fork"
    assert first["module"] == "__main__"
    assert first["arguments"] == [str(place.files / "one"), "exit", "3"]
    assert first["folder"] == str(place.files)
    assert first["path"][:2] == [str(place.files), str(CHECKOUT)]
    expected = os.environ | {FOLDER_VARIABLE: str(place.folder), MARK: place.mark, "MLPIPES_TEST": "a"}
    assert first["environment"] == expected | {"MLPIPES_FINGERPRINT": "one", "PYTHONPATH": str(CHECKOUT)}

    waiting = place.start("two", "wait", MLPIPES_TEST="a")
    second = place.told("two")
    code, _, errors, third = place.run("three", "error", MLPIPES_TEST="a")
    assert code == 1
    assert "RuntimeError: an error of the driver's" in errors
    assert first["parent"] == second["parent"] == third["parent"], "one process forks them all"
    assert len({first["drawn"], second["drawn"], third["drawn"]}) == 3, "they draw random numbers of their own"
    assert third["sockets"] == [], "it has neither the warm process's sockets nor another driver's"
    # Whoever looks finds the driver by its fingerprint and by its name, as long as it lives, and it ends as it is asked to.
    found = {
        process.pid: " ".join(process.cmdline()) for process in processes_of("two") if process.pid != second["child"]
    }
    assert set(found) == {waiting.pid, second["pid"]}
    assert all("mlpipes_tests.compute.driver_subject" in words for words in found.values())
    waiting.terminate()
    assert waiting.wait(LIMIT_SECONDS) == 7
    assert processes_of("one") == processes_of("two") == []


def test_one_that_was_started_ahead_is_the_one_that_is_asked(place: Place) -> None:
    warm_driver.start_ahead(place.environment("ahead"))
    ahead = [p.pid for p in with_variable(MARK, place.mark) if "mlpipes.compute.warm_process" in p.cmdline()]
    code, _, _, told = place.run("one", "exit", OMP_NUM_THREADS="1")
    assert (code, [told["parent"]]) == (0, ahead)


def test_what_trainings_have_imported_is_imported_ahead(place: Place) -> None:
    noted = place.files / "home" / "ray" / "imported.json"
    noted.parent.mkdir(parents=True)
    # Nothing but the slow modules, whatever stands there, and what another version has not is passed over.
    noted.write_text(json.dumps(["torchvision", "transformers.models.gone", "wave", 3]))
    home = {"MLPIPES_HOME": str(noted.parents[1])}
    code, _, _, first = place.run("before", "exit", **home)
    log = next(place.folder.glob("warm-*.log"))
    until(lambda: "transformers.models.gone" in log.read_text(), "it has tried all modules")
    code, _, _, second = place.run("after", "exit", **home)
    assert (code, second["parent"]) == (0, first["parent"])
    assert {"torchvision", "transformers"} <= set(second["imported"])
    assert "wave" not in second["imported"]
    assert not any(name.startswith("mlpipes.store") for name in second["imported"]), "each fork reads our code anew"


def test_a_driver_and_its_stand_in_end_together(place: Place) -> None:
    waiting = place.start("killed", "wait")
    os.kill(place.told("killed")["pid"], signal.SIGKILL)
    assert waiting.wait(LIMIT_SECONDS) == -signal.SIGKILL

    waiting = place.start("left", "wait")
    told = place.told("left")
    waiting.kill()
    until(lambda: not alive(told["pid"]), "the driver has ended with its stand-in")
    until(lambda: not alive(told["child"]), "what it had started has ended, too")

    waiting = place.start("orphaned", "wait")
    told = place.told("orphaned")
    os.kill(told["parent"], signal.SIGKILL)
    assert waiting.wait(LIMIT_SECONDS) == 1
    until(lambda: not alive(told["pid"]), "the driver has ended with the warm process")
    code, _, _, next_one = place.run("next", "exit")
    assert code == 0
    assert next_one["warm"]
    assert next_one["parent"] != told["parent"], "the next driver starts another warm process"


def test_another_environment_or_another_package_gets_another_process(place: Place) -> None:
    waiting = place.start("old", "wait", MLPIPES_TEST="a")
    old = place.told("old")
    code, _, _, new = place.run("new", "exit", MLPIPES_TEST="b")
    assert code == 0
    assert new["warm"]
    assert new["environment"]["MLPIPES_TEST"] == "b"
    assert new["parent"] != old["parent"]
    code, _, _, elsewhere = place.run("elsewhere", "exit", MLPIPES_TEST="b", MLPIPES_HOME="/elsewhere")
    assert (code, elsewhere["environment"]["MLPIPES_HOME"]) == (0, "/elsewhere")
    assert elsewhere["parent"] == new["parent"], "nothing of others reads which home it is"
    assert waiting.poll() is None, "who trains is left alone"
    waiting.terminate()
    assert waiting.wait(LIMIT_SECONDS) == 7
    assert alive(old["parent"]), "it is there for others with its environment"


def test_what_was_installed_since_counts(tmp_path: Path) -> None:
    packages = tmp_path / "site-packages"
    packages.mkdir()
    request = Request([], {"A": "1", "MLPIPES_FINGERPRINT": "x"}, "/", [str(packages)])
    before = request.key
    assert Request([], {"A": "1", "MLPIPES_FINGERPRINT": "y"}, "/", [str(packages)]).key == before
    assert Request([], {"A": "2", "MLPIPES_FINGERPRINT": "x"}, "/", [str(packages)]).key != before
    os.utime(packages, ns=(1, 1))
    assert request.key != before


def test_one_that_does_not_answer_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request.of_this_process(["module"])
    monkeypatch.setattr(warm_driver, "_PATIENCE_SECONDS", 0.2)
    with tempfile.TemporaryDirectory(prefix="warm-") as folder, socket.socket(socket.AF_UNIX) as frozen:
        path = Path(folder, f"warm-{request.key}.socket")
        frozen.bind(str(path))
        frozen.listen()
        with pytest.raises(TimeoutError):
            warm_driver._forked(Path(folder), request)
        assert not path.exists(), "the next one starts another"
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(TimeoutError):
                warm_driver._forked(Path(folder), request)


def test_two_answers_at_once_are_two() -> None:
    here, there = socket.socketpair()
    with here, there:
        there.sendall(b'{"pid": 5}\n{"code": 0}\n')
        assert warm_driver._answer(here) == {"pid": 5}
        assert warm_driver._answer(here) == {"code": 0}


def test_a_driver_has_the_masks_of_its_command(place: Place) -> None:
    assert place.run("plain", "exit")[0] == 0, "another command has started the warm process"
    command = shlex.join([sys.executable, "-c", _MASKED, *place.command("masked", "exit")])
    done = subprocess.run(
        ["bash", "-c", f"umask 027; exec {command} <&-"], env=place.environment("masked"), timeout=LIMIT_SECONDS
    )
    assert done.returncode == 0
    told = place.told("masked")
    assert told["parent"] == place.told("plain")["parent"]
    assert told["umask"] == 0o027
    assert told["blocked"] == [int(signal.SIGUSR1)]


def test_two_that_come_at_once_share_one_process(place: Place) -> None:
    both = [place.start(name, "exit") for name in ("a", "b")]
    assert [process.wait(LIMIT_SECONDS) for process in both] == [0, 0]
    assert place.told("a")["parent"] == place.told("b")["parent"]


@pytest.mark.parametrize("trouble", ["nowhere", "no place for a socket", "a process that cannot import"])
def test_without_a_warm_process_a_driver_runs_by_itself(place: Place, trouble: str) -> None:
    environment = {FOLDER_VARIABLE: ""}
    if trouble == "no place for a socket":
        (place.folder / ("x" * 100)).mkdir()
        environment = {FOLDER_VARIABLE: str(place.folder / ("x" * 100))}
    elif trouble == "a process that cannot import":
        (place.files / "mlflow.py").write_text("raise ImportError('broken')")
        environment = {"PYTHONPATH": f"{place.files}:{CHECKOUT}"}
    code, output, _, told = place.run("alone", "exit", "3", **environment)
    assert code == 3
    assert not told["warm"]
    assert "to output by alone" in output
    assert ("without a warm one" in output) == (trouble != "nowhere")


def test_the_stacks_of_a_training_have_its_forked_driver(place: Place, tmp_path: Path) -> None:
    waiting = place.start("stacked", "wait")
    place.told("stacked")
    kept = keep_stacks("stacked", tmp_path / "stacks.txt").read_text()
    waiting.terminate()
    assert waiting.wait(LIMIT_SECONDS) == 7
    assert "driver_subject.py" in kept, kept


def test_it_ends_when_nobody_has_asked_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_process, "IDLE_SECONDS", 0.01)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0" + tmp_path.name + str(time.time_ns()))
        listener.listen()
        assert WarmProcess(listener).serve() is None


def test_a_module_that_ends_its_process_when_it_is_imported_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = list[str]()

    def ends(name: str) -> None:
        imported.append(name)
        raise SystemExit(3)

    monkeypatch.setattr(warm_process.importlib, "import_module", ends)
    monkeypatch.setattr(warm_process.gc, "freeze", lambda: None)
    process = WarmProcess(socket.socket(socket.AF_UNIX), lambda: ["one", "two"])
    assert [process._import_one() for _ in range(3)] == [True, True, False]
    assert imported == ["one", "two"], "each once"


def test_who_breaks_off_harms_nobody(place: Place) -> None:
    code, _, _, first = place.run("before", "exit")
    assert code == 0
    for said in (b"", b"\0\0", (1 << 40).to_bytes(8, "big"), (2).to_bytes(8, "big") + b"{}"):
        with socket.socket(socket.AF_UNIX) as broken:
            broken.connect(str(next(place.folder.glob("warm-*.socket"))))
            broken.sendall(said)
    code, _, _, second = place.run("after", "exit")
    assert code == 0
    assert second["parent"] == first["parent"]


@pytest.mark.parametrize(
    ("end", "code", "said"), [("return 3", 3, ""), ("raise OSError('the disk is gone')", 1, "OSError")]
)
def test_a_driver_ends_at_once_and_says_what_was_raised(end: str, code: int, said: str) -> None:
    """Whoever starts the next attempt waits for it; Python would take down what it has imported first."""
    program = f"""
import atexit
from mlpipes.compute.warm_driver import run_driver

def main():
    print("worked", end="")
    {end}

atexit.register(lambda: print("took its time"))
run_driver(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=CHECKOUT, timeout=LIMIT_SECONDS
    )
    assert (done.returncode, done.stdout) == (code, "worked")
    assert done.stderr.startswith("Traceback") == bool(said)
    assert said in done.stderr


def test_options_of_python_that_ray_repeats_are_no_module(tmp_path: Path) -> None:
    """Where PYTHONNOUSERSITE is set, as by conda, Ray starts each worker by `<python> -s <worker>`."""
    (worker := tmp_path / "worker.py").write_text("import sys; print(sys.argv[1:])")
    done = subprocess.run(
        [sys.executable, "-m", warm_driver.__name__, "-s", "-S", str(worker), "-s", "--node=1"],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        timeout=LIMIT_SECONDS,
        env={name: value for name, value in os.environ.items() if name != FOLDER_VARIABLE},
        check=True,
    )
    assert done.stdout == "['-s', '--node=1']\n"
