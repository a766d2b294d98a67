"""The driver of a training: what the Ray job runs. Starts the workers, and passes the curve on to MLflow.

Run as `python -m mlpipes.training.job <specification>`. It exits with 0 only if the result is in the store.
"""

import shutil
import sys
import threading
from pathlib import Path
from typing import Any

from mlpipes.tracking.runs import MetricFollower
from mlpipes.training.messages import MessageWriter
from mlpipes.training.specification import TrainingJob


def main(path: Path) -> int:
    """Drive one attempt to its end; returns the exit code."""
    job = TrainingJob.read(path)
    notify = MessageWriter(job.folder.messages(job.attempt))
    notify("driver", attempt=job.attempt, workload=job.recipe.workload, scale=job.recipe.scale.key)
    stop = threading.Event()
    follower = None
    if job.tracking is not None:
        follower = MetricFollower(job.tracking.uri, job.tracking.run_id, job.folder.messages(job.attempt), notify)
        follower.start(stop)
    try:
        _fit(job, path)
    except Exception as error:
        # Not fatal: the workers report what is; this is what is left, such as too many lost workers or a lost head.
        notify("failed", error=f"{type(error).__name__}: {error}", fatal=False)
        raise
    finally:
        stop.set()
        if follower is not None:
            follower.join()
    return 0 if job.folder.result.is_file() else 1


def _worker(config: dict[str, Any]) -> None:
    from mlpipes.training.worker import train_on_ray  # in the workers only: the driver has no use for the workload

    train_on_ray(config)


def _fit(job: TrainingJob, path: Path) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    scale = job.recipe.scale
    # Ray's own bookkeeping is not needed for recovery (our checkpoints are the truth) and is not written atomically, so
    # every attempt gets a folder of its own, and nothing is ever restored from it.
    bookkeeping = job.folder.path / "ray" / f"a{job.attempt}"
    # nccl needs a whole GPU per rank; workers that share one talk through gloo.
    backend = "nccl" if scale.gpus_per_worker >= 1 else "gloo"
    resources = {"CPU": scale.cpus_per_worker} | ({"GPU": scale.gpus_per_worker} if scale.gpus_per_worker else {})
    TorchTrainer(
        _worker,
        train_loop_config={"job": str(path)},
        torch_config=TorchConfig(backend=backend),
        scaling_config=ScalingConfig(
            num_workers=scale.workers, use_gpu=scale.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(bookkeeping),
            failure_config=FailureConfig(max_failures=job.max_worker_failures),
        ),
    ).fit()
    shutil.rmtree(bookkeeping, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
