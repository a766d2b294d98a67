"""The driver of a training: what the Ray job runs. Starts the workers, or is the only one; passes the curve on to MLflow.

Run as `python -m mlpipes.training.driver <specification>`. It exits with 0 only if the result is in the store.
"""

import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

from mlpipes.compute.warm_driver import run_driver
from mlpipes.store.heartbeat import HEARTBEAT_SECONDS
from mlpipes.store.lease import Lease
from mlpipes.store.messages import DriverStarted, Failed, MessageWriter, Notify, Warned, read_messages
from mlpipes.store.training_job import TrainingJob, forget_handovers
from mlpipes.tracking.runs import MetricFollower


def main(path: Path) -> int:
    """Drive one attempt to its end; returns the exit code."""
    job = TrainingJob.read(path)
    job.take_over()
    if job.recipe.scale.trains_in_driver:
        # As Ray does in its workers, and before NumPy is imported: what its threads add up may depend on their number.
        os.environ["OMP_NUM_THREADS"] = str(job.recipe.scale.threads)
        os.environ["MLFLOW_HTTP_REQUEST_BACKOFF_JITTER"] = (
            "0"  # its client would draw from Python's random numbers here
        )
    notify = MessageWriter(job.folder.messages(job.attempt))
    notify(DriverStarted(attempt=job.attempt, workload=job.recipe.workload, scale=job.recipe.scale.key))
    lease = Lease.take(job.folder.path, f"job a{job.attempt}")
    stop = threading.Event()
    threading.Thread(target=_watch_over, args=(job, lease, notify, stop), daemon=True, name="watch").start()
    follower = None
    if job.tracking is not None:
        follower = MetricFollower(job.tracking.uri, job.tracking.run_id, job.folder.messages(job.attempt), notify)
        follower.start(stop)
    try:
        _fit(job, path, lease)
    except Exception as error:
        # Not fatal: the workers report what is; this is what is left, such as too many lost workers or a lost head.
        notify(Failed(error=f"{type(error).__name__}: {error}", fatal=False))
        raise
    finally:
        stop.set()
        if follower is not None:
            follower.join()
    if not job.folder.result.is_file():
        return 1
    forget_handovers(job.folder)
    return 0


def _worker(config: dict[str, Any]) -> None:
    from mlpipes.training.worker import train_on_ray  # in the workers only: the driver has no use for the workload

    train_on_ray(config)


def _watch_over(job: TrainingJob, lease: Lease, notify: Notify, stop: threading.Event) -> None:
    """Show that this driver lives, and end it where it has nothing left to do; Ray ends its workers with it.

    That is when another job has taken over the training, or when a worker has reported an error that a restart would not
    mend: the other workers may wait for that one in a collective operation for ever.
    """
    heartbeat, messages, offset = job.folder.heartbeat(job.attempt), job.folder.messages(job.attempt), 0
    while not stop.wait(HEARTBEAT_SECONDS):
        heartbeat.touch()
        if lease.is_lost():
            notify(Warned(text="another job has taken over this training; this one ends"))
            os._exit(1)
        found, offset = read_messages(messages, offset)
        if any(isinstance(message, Failed) and message.fatal for message in found) and not stop.wait(5):
            os._exit(1)


def _fit(job: TrainingJob, path: Path, lease: Lease) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from mlpipes.training.ray_backend import GroupConfig, LeanTrainer

    scale = job.recipe.scale
    if scale.trains_in_driver:
        ray.init()  # with its own node this process ends, as a worker would
    # Ray's own bookkeeping is not needed for recovery (our checkpoints are the truth) and is not written atomically, so
    # every attempt gets a folder of its own, and nothing is ever restored from it.
    bookkeeping = job.folder.path / "ray" / f"a{job.attempt}"
    # nccl needs a whole GPU per rank; workers that share one talk through gloo.
    backend = "nccl" if scale.gpus_per_worker >= 1 else "gloo"
    resources = {"CPU": scale.cpus_per_worker} | ({"GPU": scale.gpus_per_worker} if scale.gpus_per_worker else {})
    LeanTrainer(
        _worker,
        train_loop_config={"job": str(path), "lease": lease.token},
        backend_config=GroupConfig(backend=backend),
        scaling_config=ScalingConfig(num_workers=0)  # Ray Train's local mode
        if scale.trains_in_driver
        else ScalingConfig(
            num_workers=(job.min_workers, scale.workers) if job.min_workers else scale.workers,
            elastic_resize_monitor_interval_s=job.resize_seconds,
            use_gpu=scale.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(bookkeeping),
            failure_config=FailureConfig(max_failures=job.max_worker_failures),
        ),
    ).fit()
    shutil.rmtree(bookkeeping, ignore_errors=True)


if __name__ == "__main__":
    run_driver(lambda: main(Path(sys.argv[1])))
