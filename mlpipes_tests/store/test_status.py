import io
from pathlib import Path
from typing import Any

import pytest

from mlpipes.errors import ConfigError, CorruptionError
from mlpipes.store.files import write_record
from mlpipes.store.layout import Store, TrainingFolder
from mlpipes.store.messages import (
    CheckpointSaved,
    Failed,
    MessageWriter,
    Progressed,
    Started,
    Stopping,
    Waits,
    read_messages,
)
from mlpipes.store.status import TrainingStatus, all_statuses, find_training, progress_text, trained_scales
from mlpipes.training.checkpoints import checkpoint_rows, prune_checkpoints
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
    assert (status.checkpoint, progress_text(status)["checkpoint"], status.error) == (36, "36", None)
    trained.folder.result.unlink()
    MessageWriter(trained.folder.messages(2))(Failed(error="on purpose", fatal=True))
    (status,) = all_statuses(store)
    assert (status.state, status.error) == ("failed", "on purpose")
    figures: dict[str, Any] = {"loss": 1.0, "samples_per_second": 9.0, "eta_seconds": 3.0, "epoch": 0.5}
    MessageWriter(trained.folder.messages(10))(Progressed(step=5, total_steps=36, **figures))
    (status,) = all_statuses(store)
    assert (status.state, status.step, progress_text(status)["ETA s"]) == ("running", 5, "3")
    MessageWriter(trained.folder.messages(10))(Stopping(step=5))
    MessageWriter(trained.folder.messages(10))(Progressed(step=6, total_steps=36, **figures))  # until it is ended
    (status,) = all_statuses(store)
    assert (status.state, progress_text(status)["ETA s"]) == ("stopped", "–")


def test_other_files_and_recipes_of_another_form_are_passed_over(tmp_path) -> None:
    job, store = make_job(tmp_path, SCALE), Store(tmp_path)
    write_record(job.folder.recipe, job.recipe.model_dump(mode="json"))
    MessageWriter(job.folder.messages(2))(Failed(error="on purpose", fatal=True))
    for name in ("a2 (copy).jsonl", "a3.jsonl.bak", "about.jsonl"):
        (job.folder.messages(2).parent / name).write_text("")
    write_record(store.training("other").recipe, {"workload": "digits", "of": "another version"})
    assert [status.error for status in all_statuses(store)] == ["on purpose"]
    assert list(trained_scales(store, "digits")) == [SCALE]
    with pytest.raises(ConfigError, match="it names none"):
        find_training(store, "digits", SCALE, "other")


def test_a_narrow_terminal_gets_fewer_columns_and_failures_say_why(trained, monkeypatch) -> None:
    from rich.console import Console

    from mlpipes.cli import common, training

    def shown(width: int) -> str:
        console = Console(width=width, record=True, file=io.StringIO())
        monkeypatch.setattr(common, "console", console)
        monkeypatch.setattr(training, "console", console)
        training.status(watch=False)
        return console.export_text()

    store = Store(trained.folder.path.parents[1])
    monkeypatch.setattr(training, "default_store", lambda: store)
    wide, narrow = shown(140), shown(80)
    assert trained.folder.fingerprint[:12] in wide
    for text in (SCALE, "finished", "36/36"):
        assert text in wide, "whole"
        assert text in narrow, "whole"
    assert "fingerprint" not in narrow
    trained.folder.result.unlink()
    MessageWriter(trained.folder.messages(2))(Failed(error="on [purpose]\nand so on", fatal=True))
    assert f"digits {SCALE} seed 0: on [purpose]\n" in shown(80)


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
    messages, _ = read_messages(job.folder.messages(1))
    saved = next(message for message in messages if isinstance(message, CheckpointSaved))
    assert saved.step == 1
    assert isinstance(messages[messages.index(saved) + 2], Stopping), "after its metrics"


def state_in(folder: TrainingFolder) -> TrainingStatus:
    (found,) = all_statuses(Store(folder.path.parents[1]))
    return found


def test_a_training_that_waits_says_what_for_and_is_neither_silent_nor_stopped(tmp_path: Path) -> None:
    job = make_job(tmp_path, SCALE)
    job.recipe.write_to(job.folder.recipe)
    messages = MessageWriter(job.folder.messages(1))
    messages(Waits(time=1.0, reason="waits for quota in queue training: 3 ahead"))
    found = state_in(job.folder)
    assert (found.state, found.reason) == ("waiting", "waits for quota in queue training: 3 ahead")
    messages(Waits(reason=""))
    assert state_in(job.folder).state == "starting"
    started = Started(step=3, total_steps=9, precision="fp32", workers=2)
    messages(started)
    messages(Stopping(step=4))
    assert state_in(job.folder).state == "stopped"
    messages(Waits(reason="1 of 2 worker pods are ready"))
    assert state_in(job.folder).state == "waiting"
    messages(started)  # on other pods
    assert state_in(job.folder).state == "running"
