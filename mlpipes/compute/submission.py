"""Submission: a training's specification turned into a Ray job, or found again as one that is there."""

import shlex
import sys
from pathlib import Path

from mlpipes.compute.jobs import JobHandle, RayJobs
from mlpipes.compute.stacks import FINGERPRINT_VARIABLE
from mlpipes.training.specification import TrainingJob


def attach_or_submit(jobs: RayJobs, job: TrainingJob, name: str | None = None) -> JobHandle:
    """The Ray job of a training, named after its fingerprint: the one that is alive, or the next attempt, submitted."""
    recipe, folder = job.recipe, job.folder

    def entrypoint(attempt: int) -> str:
        python = sys.executable if jobs.address.local else "python"
        specification = job.model_copy(update={"attempt": attempt}).write()
        # exec: without it a shell stands between Ray and the driver, and the driver survives the head's death.
        return f"exec {shlex.join([python, '-m', 'mlpipes.training.job', str(specification)])}"

    earlier = [int(path.stem[1:]) for path in folder.messages(0).parent.glob("a*.jsonl")]
    environment = {
        FINGERPRINT_VARIABLE: name or recipe.fingerprint,
        "MLPIPES_HOME": str(Path(job.store).parent),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONUNBUFFERED": "1",
    }
    if jobs.address.local:
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    return jobs.attach_or_submit(
        name or recipe.fingerprint,
        max(earlier, default=0) + 1,
        entrypoint,
        environment,
        metadata={"workload": recipe.workload, "scale": recipe.scale.key, "dagster_run_id": job.requested_by},
    )
