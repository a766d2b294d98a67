"""On a GPU: the same bits every time, for workers that share one, after a kill, on Ray, and of videos."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from mlpipes.compute.jobs import ALIVE, JobState
from mlpipes.compute.local import LocalRay
from mlpipes.compute.ray_jobs import RayJobs
from mlpipes.compute.stacks import processes_of
from mlpipes.store.layout import Store
from mlpipes.store.messages import Failed, Resumed, read_messages
from mlpipes.training.parallel import DistributedWorkers
from mlpipes.training.worker import explained
from mlpipes.video.job import ModelPin, VideoJob
from mlpipes.video.program import Program
from mlpipes.workloads.tensors import compute_fp32_in_full
from mlpipes_tests.barriers import Barriers
from mlpipes_tests.conftest import missing
from mlpipes_tests.held import REFERENCE
from mlpipes_tests.training.harness import make_job, run, run_here
from mlpipes_tests.video.made import images_of, job_of, picture, write_video
from mlpipes_tests.video.test_models import Small
from mlpipes_tests.waiting import until

pytestmark = pytest.mark.gpu

CUDA = "cuda"
WORKLOADS = {
    "mlpipes.workloads.image_classification:digits": ("b128", {}),
    "mlpipes.workloads.text_classification:docstrings": ("b32", {}),
    "mlpipes.workloads.super_resolution:video_sr": ("b16", {}),
    "mlpipes_tests.training.clips:clips": ("b10", {}),
}
HELD = "mlpipes_tests.held:digits"


@pytest.fixture(autouse=True)
def _gpu() -> Iterator[None]:
    if not torch.cuda.is_available():
        missing("torch sees no GPU")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_workers_that_share_a_gpu_end_in_the_bits_of_one(workload: str, precision: str, tmp_path: Path) -> None:
    batch, options = WORKLOADS[workload]
    digests = {}
    for workers in (1, 2, 1):
        job = make_job(
            tmp_path / f"{len(digests)}-{workers}-{bool(digests)}",
            f"w{workers}-{batch}-e1-g0.5",
            workload,
            logical_shards=2,
            precision=precision,
            **options,
        )
        found = run(job, device=CUDA) if workers > 1 else run_here(job, CUDA)
        assert found["environment"]["device"] == torch.cuda.get_device_name()
        digests[len(digests)] = found["weights_digest"]
    assert len(set(digests.values())) == 1, digests


def test_a_crash_on_a_gpu_changes_no_bit(tmp_path: Path) -> None:
    expected = run_here(make_job(tmp_path / "whole", "w1-b128-e3-g0.5", logical_shards=4), CUDA)
    job = make_job(tmp_path / "crashed", "w2-b128-e3-g0.5", logical_shards=4, every_steps=5)
    run(job, crash=13, device=CUDA)
    run(job, crash=22, device=CUDA, workers=1)
    assert run(job, device=CUDA)["weights_digest"] == expected["weights_digest"]


def test_fp32_is_not_rounded_to_tf32() -> None:
    compute_fp32_in_full()
    image, weights = torch.randn(1, 64, 64, 64, dtype=torch.float64), torch.randn(64, 64, 3, 3, dtype=torch.float64)
    exact = torch.nn.functional.conv2d(image, weights)
    found = torch.nn.functional.conv2d(image.float().cuda(), weights.float().cuda()).cpu().double()
    assert float((found - exact).norm() / exact.norm()) < 1e-6  # TF32: 3e-4


def test_nccl_does_what_the_engine_asks_of_a_group(tmp_path: Path) -> None:
    """A group of one: two ranks need two GPUs."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        workers, row = DistributedWorkers(), torch.arange(8.0, device=CUDA)
        assert torch.equal(workers.gather(row)[0], row)
        assert torch.equal(workers.sum(row.clone()), row)
        received = torch.empty((1, 8), device=CUDA)
        workers.swap(row, received, [True])
        assert torch.equal(received[0], row)
        whole = torch.empty(8, device=CUDA)
        workers.join(row, whole)
        assert torch.equal(whole, row)
    finally:
        dist.destroy_process_group()


def test_too_little_memory_of_the_gpu_is_said() -> None:
    with pytest.raises(torch.OutOfMemoryError) as raised:
        torch.empty(1 << 50, dtype=torch.uint8, device=CUDA)
    assert "the GPU has not enough memory" in explained(raised.value)


@pytest.mark.parametrize("scale", ["w1-b128-e3-g1", "w2-b128-e3-g0.5"])
def test_a_training_on_ray_with_gpus_that_is_killed_ends_in_the_same_bits(
    scale: str, ray_home: Path, tmp_path: Path
) -> None:
    """Of two workers that share a GPU, one is killed, and Ray Train starts both again; a lone one's job is done again."""
    expected = run_here(make_job(tmp_path / "store", scale, REFERENCE, seed=7), CUDA)
    job, jobs = make_job(ray_home / "store", scale, HELD, seed=7), RayJobs(LocalRay(ray_home / "ray").ensure())
    barriers = Barriers(ray_home)
    barriers.close(0.5)
    try:
        handle = jobs.attach_or_submit(job)
        barriers.wait_for(0.5, vain=lambda: "" if jobs.status(handle).state in ALIVE else jobs.logs(handle, job.folder))
        lone = scale.startswith("w1")
        wanted = "mlpipes.training.driver" if lone else "RayTrainWorker"
        victims = [p for p in processes_of(job.recipe.fingerprint) if wanted in " ".join(p.cmdline())]
        assert victims
        victims[0].send_signal(signal.SIGKILL)
        psutil.wait_procs(victims[:1], timeout=60)
        if lone:
            until(lambda: jobs.status(handle).state == JobState.FAILED, "Ray sees that the job has failed")
    finally:
        barriers.open()
    if lone:
        handle = jobs.attach_or_submit(job)
    until(lambda: jobs.status(handle).state not in ALIVE, "the job has ended")
    assert jobs.status(handle).state == JobState.SUCCEEDED, jobs.logs(handle, job.folder)
    messages, _ = read_messages(job.folder.messages(handle.attempt))
    assert not [message for message in messages if isinstance(message, Failed) and message.fatal]
    assert any(isinstance(message, Resumed) and message.step > 0 for message in messages), "it began anew"
    content = json.loads(job.folder.result.read_text())["content"]
    assert content["weights_digest"] == expected["weights_digest"]
    assert content["usage"]["peak_gpu_memory_bytes"] > 0


def _program(folder: Path) -> ModelPin:
    sizes = dict.fromkeys(range(3), torch.export.Dim.AUTO)
    example = torch.zeros((2, 20, 24, 3), dtype=torch.uint8)
    torch.export.save(torch.export.export(Small(), (example,), dynamic_shapes={"frames": sizes}), folder / "model.pt2")
    return ModelPin(name="x", kind="program", digest="x", scale=2, reach=3)


def test_frames_on_a_gpu_are_those_of_the_cpu_but_for_rounding(tmp_path: Path) -> None:
    import numpy as np

    pinned, frames = _program(tmp_path), np.stack([picture(n, 200, 120) for n in range(4)])
    there = Program(tmp_path / "model.pt2", pinned.model_copy(update={"device": "cuda"}))
    here, found = Program(tmp_path / "model.pt2", pinned)(frames), there(frames)
    assert np.abs(here.astype(int) - found).max() <= 1
    assert (here == found).mean() > 0.999
    assert (there(frames) == found).all()
    tiled = Program(tmp_path / "model.pt2", there_pin := pinned.model_copy(update={"device": "cuda"}), tile=(64, 64))
    assert np.abs(tiled(frames).astype(int) - found).max() <= 1
    bf16 = Program(tmp_path / "model.pt2", there_pin.model_copy(update={"precision": "bf16"}))(frames)
    assert np.abs(bf16.astype(int) - found).mean() < 1


def test_a_video_on_gpus_has_the_same_bytes_for_any_workers(ray_home: Path, tmp_path: Path) -> None:
    from mlpipes.store.files import publishing, sha256_file
    from mlpipes.video.following import follow
    from mlpipes.video.joining import file_of, final_of
    from mlpipes.video.models import _FILE, _KIND, _VERSION, _place
    from mlpipes.video.places import VideoRayJobs

    pinned, path = _program(tmp_path), write_video(tmp_path / "x.mkv", 30)
    pinned = pinned.model_copy(update={"digest": "small", "device": "cuda"})
    results = set()
    for number, (workers, share, chunk) in enumerate([(1, 1.0, 8), (2, 0.5, 4), (3, 0.3, 16)]):
        store = Store(ray_home / f"videos{number}")
        with publishing(_place(store, "small"), kind=_KIND, version=_VERSION) as draft:
            (draft.path / _FILE).write_bytes((tmp_path / "model.pt2").read_bytes())
        job: VideoJob = job_of(path, store.root, chunk=chunk).model_copy(
            update={"model": pinned, "workers": workers, "gpus_per_worker": share}
        )
        follow(job, lambda: VideoRayJobs(LocalRay(ray_home / "ray").ensure()))
        final = final_of(job)
        assert final is not None
        file = file_of(job, final)
        assert len(images_of(file)) == 30
        results.add(sha256_file(file))
    assert len(results) == 1
