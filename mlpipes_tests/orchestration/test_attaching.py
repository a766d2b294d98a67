"""What a place lacks keeps a training from beginning there, and no run from attaching to one that is under way."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from mlpipes.compute.jobs import JobHandle, Jobs, JobState, JobStatus
from mlpipes.errors import PreflightError
from mlpipes.orchestration.training import _check_place
from mlpipes.scales import RayScaleConfig
from mlpipes.store.training_job import TrainingJob
from mlpipes_tests.orchestration.test_following import Place, job

job = job


class Queue(Place):
    """A place whose looks find something missing, or nothing, one after the other."""

    def __init__(self, missing: Iterable[str], state: JobState | None = None) -> None:
        super().__init__()
        self.missing, self.state = list(missing), state

    def check(self, scale: RayScaleConfig, data_bytes: int, min_workers: int | None = None) -> None:
        if said := self.missing.pop(0):
            raise PreflightError(said)

    def latest(self, name: str) -> tuple[JobHandle, JobStatus] | None:
        return (JobHandle("job-1", 1, attached=True), JobStatus(self.state)) if self.state else None


def check(place: Jobs, job: TrainingJob) -> list[str]:
    """What is warned of."""
    context: Any = SimpleNamespace(log=MagicMock())
    _check_place(context, place, job, 0)
    return [call.args[0] for call in context.log.warning.call_args_list]


def test_what_is_missing_ends_a_training_that_never_began_at_once(job: TrainingJob) -> None:
    assert check(Queue([""]), job) == []
    with pytest.raises(PreflightError, match="the queue is stopped"):
        check(Queue(["the queue is stopped"], JobState.RUNNING), job)  # one of before a fresh store, say


def test_what_is_missing_keeps_nobody_from_a_training_that_is_under_way(job: TrainingJob) -> None:
    job.model_copy(update={"attempt": 1}).write()
    for state in (JobState.PENDING, JobState.RUNNING):
        assert check(Queue(["the queue is stopped"], state), job) == [
            "job job-1 is under way all the same: the queue is stopped"
        ]
    for state in (JobState.FAILED, None):
        with pytest.raises(PreflightError, match="it still is"):
            check(Queue(["the queue is stopped", "it still is"], state), job)
        assert check(Queue(["the API server does not answer", ""], state), job) == [], "it answers again"
