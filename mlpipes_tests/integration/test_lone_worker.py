"""A scale of one worker trains in its job's own process; where that is killed, the next job ends in the same bits."""

import json
import signal
import sys
from pathlib import Path

import psutil
import pytest

from mlpipes.compute.jobs import ALIVE, JobState
from mlpipes.compute.local import LocalRay
from mlpipes.compute.ray_jobs import RayJobs
from mlpipes.compute.stacks import processes_of
from mlpipes.store.messages import EpochEnded, Resumed, read_messages
from mlpipes_tests.barriers import Barriers
from mlpipes_tests.held import REFERENCE
from mlpipes_tests.training.harness import make_job, run_here
from mlpipes_tests.waiting import until

SCALE = "w1-b128-e3-g0"
HELD = "mlpipes_tests.held:digits"


def _digest(result: Path) -> str:
    return json.loads(result.read_text())["content"]["weights_digest"]


def _words(process: psutil.Process) -> list[str]:
    """Its command line; empty if it has ended meanwhile, as what a driver asks `git` for does."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_killed_job_is_followed_by_one_that_ends_in_the_same_bits(ray_home: Path, tmp_path: Path) -> None:
    expected = make_job(tmp_path / "store", SCALE, REFERENCE, seed=77)
    run_here(expected)
    job, jobs = make_job(ray_home / "store", SCALE, HELD, seed=77), RayJobs(LocalRay(ray_home / "ray").ensure())
    barriers = Barriers(ray_home)
    barriers.close(0.5)
    try:
        first = jobs.attach_or_submit(job)
        barriers.wait_for(0.5, vain=lambda: "" if jobs.status(first).state in ALIVE else jobs.logs(first, job.folder))
        trains = [p for p in processes_of(job.recipe.fingerprint) if "mlpipes.training.driver" in _words(p)]
        # Another stands in for it, unless a busy machine had it run there.
        trains = [p for p in trains if "mlpipes.compute.warm_driver" not in _words(p)] or trains
        assert len(trains) == 1
        workers = [p for p in processes_of(job.recipe.fingerprint) if "RayTrainWorker" in " ".join(_words(p))]
        assert not workers, "the driver is the worker"
        trains[0].send_signal(signal.SIGKILL)
        psutil.wait_procs(trains, timeout=60)
        until(lambda: jobs.status(first).state == JobState.FAILED, "Ray sees that the job has failed")
    finally:
        barriers.open()
    second = jobs.attach_or_submit(job)
    assert second.attempt == first.attempt + 1
    until(lambda: jobs.status(second).state not in ALIVE, "the second job has ended")
    assert jobs.status(second).state == JobState.SUCCEEDED, jobs.logs(second, job.folder)
    messages, _ = read_messages(job.folder.messages(second.attempt))
    assert any(isinstance(message, Resumed) and message.step > 0 for message in messages), "it began anew"
    assert any(isinstance(message, EpochEnded) for message in messages)
    assert _digest(job.folder.result) == _digest(expected.folder.result)


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")
def test_the_first_job_of_a_ray_is_forked_from_what_was_started_with_it(tmp_path: Path) -> None:
    ray = LocalRay(tmp_path / "ray")
    try:
        jobs = RayJobs(ray.ensure())
        state = ray.status()
        assert state is not None
        begun = list(Path(state["temporary"]).glob("warm-*.log"))
        assert len(begun) == 1
        handle = jobs.attach_or_submit(job := make_job(tmp_path / "store", "w1-b128-e1-g0"))
        until(lambda: jobs.status(handle).state not in ALIVE, "the job has ended")
        assert jobs.status(handle).state == JobState.SUCCEEDED, jobs.logs(handle, job.folder)
        assert list(Path(state["temporary"]).glob("warm-*.log")) == begun
        assert "starts without a warm one" not in jobs.logs(handle, job.folder)
    finally:
        ray.stop()
