"""Following a training: when its restarts are given up."""

from pathlib import Path

from mlpipes.orchestration.following import MAX_JOBS, _Restarts
from mlpipes.store.layout import TrainingFolder


def test_restarts_are_given_up_when_five_in_a_row_bring_no_checkpoint(tmp_path: Path) -> None:
    folder = TrainingFolder(tmp_path)
    restarts = _Restarts(folder)
    assert [restarts.are_in_vain() for _ in range(4)] == [False] * 4
    for step in range(1, 20):  # as a job that is requeued at each time limit, and gets on each time
        (folder.checkpoints / f"step-{step:08d}").mkdir(parents=True)
        assert not restarts.are_in_vain()
    assert [restarts.are_in_vain() for _ in range(MAX_JOBS - 1)] == [False] * (MAX_JOBS - 2) + [True]
    assert str(restarts) == "5 jobs in a row ended without a result and got no further than step 19"
