import pytest

from mlpipes.errors import CorruptionError
from mlpipes.files import write_record
from mlpipes.status import all_statuses, checkpoint_rows, progress_text, prune_checkpoints
from mlpipes.store import Store
from mlpipes.training.messages import MessageWriter
from mlpipes_tests.training.harness import make_job, run_here

SCALE = "w1-b128-e4-g0"


@pytest.fixture
def trained(tmp_path):
    job = make_job(tmp_path, SCALE)
    write_record(job.folder.recipe, job.recipe.model_dump(mode="json"))
    run_here(job)
    return job


def test_the_store_tells_the_state_of_a_training(trained) -> None:
    store = Store(trained.folder.path.parents[1])
    (status,) = all_statuses(store)
    assert (status.workload, status.scale, status.state, status.step) == ("digits", SCALE, "finished", 36)
    assert status.metrics["validation_accuracy"] > 0.5
    assert progress_text(status)["step"] == "36/36"
    trained.folder.result.unlink()
    MessageWriter(trained.folder.messages(2))("failed", error="on purpose", fatal=True)
    (status,) = all_statuses(store)
    assert (status.state, status.error) == ("failed", "on purpose")
    figures = {"loss": 1.0, "samples_per_second": 9.0, "eta_seconds": 3.0, "epoch": 0.5}
    MessageWriter(trained.folder.messages(10))("progress", step=5, total_steps=36, **figures)
    (status,) = all_statuses(store)
    assert (status.state, status.step, progress_text(status)["ETA s"]) == ("running", 5, "3")


def test_checkpoints_are_listed_verified_and_pruned(trained) -> None:
    store = Store(trained.folder.path.parents[1])
    rows = list(checkpoint_rows(store, "digits", SCALE))
    assert [row["state"] for row in rows] == ["good"] * len(rows)
    assert sum(row["best"] == "yes" for row in rows) >= 1
    kept = max(2, len(rows)) - prune_checkpoints(store, "digits", SCALE)
    assert len(list(checkpoint_rows(store, "digits", SCALE))) == kept <= 2
    latest = sorted(trained.folder.checkpoints.glob("step-*"))[-1]
    (latest / "optimizers.pt").write_bytes(b"torn")
    assert "optimizers.pt" in list(checkpoint_rows(store, "digits", SCALE))[-1]["state"]
    with pytest.raises(CorruptionError):
        prune_checkpoints(store, "digits", SCALE)
    assert list(checkpoint_rows(store, "digits", "w2-b128-e4-g0")) == []


def test_a_last_checkpoint_is_written_when_asked_for(tmp_path) -> None:
    job = make_job(tmp_path, SCALE)
    job.folder.stop_request(1).parent.mkdir(parents=True)
    job.folder.stop_request(1).touch()
    run_here(job)
    messages = job.folder.messages(1).read_text()
    assert '"kind": "stopping"' in messages
    first = messages.index('"kind": "checkpoint"')
    assert messages.index('"step": 1,', first) < messages.index('"kind": "stopping"')
