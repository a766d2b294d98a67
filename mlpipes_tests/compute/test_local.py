"""The private Ray of a machine: how it starts, or does not, and what becomes of one that is dead."""

import shlex
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from mlpipes.compute import local, ray_service, ray_start
from mlpipes.compute.address import RayAddress
from mlpipes.compute.local import LocalRay
from mlpipes.compute.processes import with_variable
from mlpipes.compute.ray_jobs import RayJobs
from mlpipes.compute.ray_node import MARK
from mlpipes.compute.ray_start import leaner
from mlpipes.errors import PreflightError
from mlpipes_tests.sandbox import CHECKOUT
from mlpipes_tests.waiting import until


def test_a_ray_that_does_not_start_leaves_no_warm_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = list[str]()

    def ahead(environment: Mapping[str, str]) -> None:
        marks.append(environment[MARK])
        subprocess.Popen(["sleep", "1000"], env=dict(environment), start_new_session=True)

    monkeypatch.setattr(local, "start_ahead", ahead)
    monkeypatch.setattr(local, "start_command", lambda *_, **__: [sys.executable, "-c", "raise SystemExit('no room')"])
    with pytest.raises(PreflightError, match="no room"):
        LocalRay(tmp_path / "ray").ensure()
    assert len(marks) == 1, "a machine that is too busy is not given more to do"
    assert with_variable(MARK, marks[0]) == []


@pytest.mark.parametrize("lives", [True, False])
def test_what_a_dead_ray_leaves_is_not_asked_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives: bool
) -> None:
    asked = list[Any]()
    monkeypatch.setattr(local, "end_marked", lambda *_, gently, **__: asked.append(gently))
    this = psutil.Process()
    state = {
        "pid": this.pid,
        "created": this.create_time() + (not lives),
        "mark": "m",
        "temporary": str(tmp_path / "r"),
    }
    LocalRay(tmp_path / "ray")._end(state)
    assert asked == [lives]


def test_nobody_waits_for_a_ray_that_has_died_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    lives = iter([True, False, False])
    jobs, asked = RayJobs(RayAddress("http://127.0.0.1:1", local=True, lives=lambda: next(lives))), list[int]()

    def away(_: object) -> None:
        asked.append(1)
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(jobs, "_call", away)
    with pytest.raises(ConnectionError, match="is away: nobody answers"):
        jobs.latest("training")
    assert len(asked) == 1


_VERSION = """
import sys
from mlpipes.compute import ray_start
sys.argv = ["ray", "--version"]
try:
    ray_start.main()
finally:
    print(sorted({"ray.serve", "pandas"} & set(sys.modules)))
"""


def test_ray_starts_without_the_commands_that_nobody_asks_for() -> None:
    for name in ray_start._LEFT_OUT:
        assert (Path(ray.__file__).parents[1] / f"{name.replace('.', '/')}.py").is_file(), "Ray has another name for it"
    ended = subprocess.run([sys.executable, "-c", _VERSION], capture_output=True, text=True, cwd=CHECKOUT, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


_PROGRAM = """
import sys
print(__name__, sys.argv, sys.path[0])
try:
    import kubernetes
except ImportError:
    print("no kubernetes")
"""


def test_programs_of_ray_run_as_they_are_but_for_what_they_import_in_vain(tmp_path: Path) -> None:
    (program := tmp_path / "program.py").write_text(_PROGRAM)
    command = [sys.executable, "-u", ray_service.__file__, str(program), "--node-id=1", "two words"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = f"__main__ {[str(program), '--node-id=1', 'two words']} {tmp_path}"
    assert done.stdout.splitlines() == [told, "no kubernetes"]


def test_processes_of_ray_get_less_to_do() -> None:
    agent = ["/a python", "-u", "/in ray/dashboard/agent.py", "--node-id=1", 'a "name"']
    raylet = [
        *("raylet", "--maximum_startup_concurrency=2", "--num_prestart_python_workers=2"),
        f"--dashboard_agent_command={subprocess.list2cmdline(agent)}",
    ]
    *words, told = leaner(raylet)
    assert words == ["raylet", "--maximum_startup_concurrency=4", "--num_prestart_python_workers=0"]
    name, _, command = told.partition("=")
    assert (name, shlex.split(command)) == ("--dashboard_agent_command", [*agent[:2], ray_service.__file__, *agent[2:]])
    assert leaner(["--maximum_startup_concurrency=64"]) == ["--maximum_startup_concurrency=64"]
    for untouched in (["gcs_server", "--port=1"], ["--dashboard_agent_command=/o'brien/python /in/dashboard/agent.py"]):
        assert leaner(untouched) == untouched


_HELD_AGENT = """
import os, sys, time
if any(argument.endswith("dashboard/agent.py") for argument in sys.orig_argv):
    open({held!r}, "w").close()
    while not os.path.exists({gate!r}):
        time.sleep(0.05)
"""


def test_a_node_registers_before_its_agent_has_been_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raylets end themselves after 15 s without their agent's port; a busy machine may need that for the agent's imports."""
    held, gate = tmp_path / "held", tmp_path / "gate"
    (tmp_path / "sitecustomize.py").write_text(_HELD_AGENT.format(held=str(held), gate=str(gate)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(local, "start_ahead", lambda _: None)
    local_ray = LocalRay(tmp_path / "ray")

    def registered() -> bool:
        state = local_ray._read()
        return state is not None and local_ray._answers(state) and local_ray._has_a_node(state)

    with ThreadPoolExecutor(1) as pool:
        try:
            address = pool.submit(local_ray.ensure)
            until(held.exists, "the agent was held")
            until(
                registered, "the node has registered", vain=lambda: "it came up, or did not" if address.done() else ""
            )
            assert not address.done(), "nobody runs its jobs"
            gate.touch()
            jobs = RayJobs(address.result())
            jobs._patiently(lambda client: client.submit_job(entrypoint="true", submission_id="job"))
            until(lambda: jobs._patiently(lambda client: client.get_job_status("job")) == "SUCCEEDED", "a job runs")
        finally:
            gate.touch()
            local_ray.stop()
