from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mlpipes.compute.jobs import Ended, JobHandle, JobState, JobStatus
from mlpipes.errors import ConfigError
from mlpipes.evaluation.replay import Comparison, replay
from mlpipes.store.files import read_record, write_record
from mlpipes.store.layout import Store, TrainingFolder
from mlpipes.store.references import TrainingReference
from mlpipes.store.status import find_training
from mlpipes.store.training_job import TrainingJob
from mlpipes.training.determinism import DataOrder
from mlpipes_tests.training.harness import make_job, run_here

SCALE = "w1-b128-e2-g0"


class JobsHere:
    """Runs a job in this process when it is followed; the rest of the replay is the real one."""

    def __init__(self) -> None:
        self.job: TrainingJob | None = None

    def attach_or_submit(self, job: TrainingJob, name: str) -> JobHandle:
        assert name.startswith("replay-"), "the job of a replay must never be taken for the training's own"
        self.job = job
        return JobHandle(name, 1, attached=False)

    def follow(self, handle: JobHandle, folder: TrainingFolder) -> Iterator[Ended]:
        assert self.job is not None
        run_here(self.job)
        yield Ended(JobStatus(JobState.SUCCEEDED))


@pytest.fixture
def jobs() -> JobsHere:
    return JobsHere()


@pytest.fixture
def trained(tmp_path: Path) -> TrainingJob:
    job = make_job(tmp_path / "store", SCALE)
    job = job.model_copy(update={"requested_by": "dagster-run-1"})
    write_record(job.folder.recipe, job.recipe.model_dump(mode="json"))
    run_here(job)
    reference = TrainingReference(fingerprint=job.recipe.fingerprint, mlflow_run_id="r", snapshot=job.recipe.snapshot)
    Store(Path(job.store)).write_reference(reference, "digits", SCALE)
    return job


def done_again(job: TrainingJob, jobs: Any) -> Comparison:
    return replay(Store(Path(job.store)), job.folder, lambda scale: jobs)


def test_a_training_done_again_is_equal_and_leaves_nothing(trained: TrainingJob, jobs: JobsHere) -> None:
    before = sorted(str(path) for path in Path(trained.store).rglob("*"))
    found = done_again(trained, jobs)
    assert found.equal
    assert "equal**, bit for bit" in found.markdown()
    assert all(old == new and old for old, new in found.digests.values())
    assert set(found.digests) == {"snapshot", "order_digest", "loss_digest", "weights_digest"}
    assert set(found.differences) <= {
        "code",
        "git.clean",
        "git.commit",
    }  # the recipe of this test has a code of its own
    assert sorted(str(path) for path in Path(trained.store).rglob("*")) == before
    assert not list((Path(trained.store).parent / "replays").iterdir())


def test_the_first_step_that_differs_is_named_with_what_differs_in_the_environment(
    trained: TrainingJob, jobs: JobsHere
) -> None:
    outcome = read_record(trained.folder.result)
    losses = [row for row in outcome["history"] if row[0] == "train/loss"]
    losses[4][1] += 1e-6
    for row in outcome["trail"][4:]:
        row[2] = "another"
    outcome |= {"loss_digest": "x", "weights_digest": "y"}
    outcome["environment"]["libraries"]["torch"] = "0.1"
    outcome["environment"]["threads"] = 64
    write_record(trained.folder.result, outcome)
    found = done_again(trained, jobs)
    assert not found.equal
    assert found.first_difference.startswith(f"step {losses[4][2]}: train/loss was")
    assert found.differences["libraries.torch"][0] == "0.1"
    assert found.differences["threads"][0] == 64
    assert "DIFFERENT" in found.markdown()
    assert "libraries.torch" in found.markdown()


def test_the_first_step_that_read_other_rows_is_named(
    trained: TrainingJob, jobs: JobsHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = DataOrder.batch

    def exchanged(order: DataOrder, epoch: int, step: int) -> torch.Tensor:
        rows = batch(order, epoch, step)
        return rows.flip(0) if (epoch, step) == (0, 6) else rows

    monkeypatch.setattr(DataOrder, "batch", exchanged)
    found = done_again(trained, jobs)
    assert not found.equal
    assert found.first_difference == "step 7: other rows were read, or in another order"


def test_data_that_changed_are_said_and_nothing_is_trained(trained: TrainingJob, jobs: JobsHere) -> None:
    recipe = trained.recipe.model_copy(update={"snapshot": "f" * 64})
    write_record(trained.folder.recipe, recipe.model_dump(mode="json"))
    found = done_again(trained, jobs)
    assert not found.equal
    assert "snapshot" in found.first_difference
    assert jobs.job is None
    assert "not reached" in found.markdown()


def test_a_training_is_found_by_its_fingerprint_or_run(trained: TrainingJob) -> None:
    store = Store(Path(trained.store))
    for run in (None, trained.recipe.fingerprint[:8], "dagster-run"):
        assert find_training(store, "digits", SCALE, run).path == trained.folder.path
    with pytest.raises(ConfigError, match="names none"):
        find_training(store, "digits", SCALE, "nothing")
    with pytest.raises(ConfigError, match="not been trained yet"):
        find_training(store, "digits", "w9-b1-e1-g0")


def test_an_unfinished_training_cannot_be_replayed(trained: TrainingJob, jobs: JobsHere) -> None:
    trained.folder.result.unlink()
    with pytest.raises(ConfigError, match="has not finished"):
        done_again(trained, jobs)
