"""Claims: each run of an entry point is an attempt of its own, whoever runs it and however often."""

import threading
from pathlib import Path

import pytest

from mlpipes.store.claims import SupersededError, claim, claimed
from mlpipes.store.layout import TrainingFolder
from mlpipes.store.messages import MessageWriter, Warned


@pytest.fixture
def folder(tmp_path: Path) -> TrainingFolder:
    made = TrainingFolder(tmp_path)
    made.specification(1).parent.mkdir()
    made.specification(1).write_text("{}")
    return made


def test_the_first_run_is_the_attempt_that_was_submitted_and_later_ones_follow(folder: TrainingFolder) -> None:
    assert claimed(folder, "job-a1") == 0
    assert [claim(folder, "job-a1", 1) for _ in range(3)] == [1, 2, 3]
    assert claimed(folder, "job-a1") == 3
    assert claimed(folder, "job-a2") == 0


def test_a_run_leaves_the_training_to_a_job_that_was_submitted_after_it(folder: TrainingFolder) -> None:
    assert claim(folder, "job-a1", 1) == 1
    folder.specification(2).write_text("{}")
    with pytest.raises(SupersededError, match="attempt 2 of another job"):
        claim(folder, "job-a1", 1)
    assert claim(folder, "job-a2", 2) == 2
    assert claimed(folder, "job-a1") == 1


def test_what_a_follower_notes_of_an_attempt_is_no_claim(folder: TrainingFolder) -> None:
    MessageWriter(folder.messages(1))(Warned(text="waits"))
    assert claim(folder, "job-a1", 1) == 1


def test_a_torn_claim_is_passed_over(folder: TrainingFolder) -> None:
    folder.claim(1).write_text("{")
    assert claimed(folder, "job-a1") == 0


def test_two_runs_at_once_claim_two_attempts(folder: TrainingFolder) -> None:
    got: list[int] = []
    runs = [threading.Thread(target=lambda: got.append(claim(folder, "job-a1", 1))) for _ in range(8)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert sorted(got) == [1, 2, 3, 4, 5, 6, 7, 8]
