import errno
from pathlib import Path
from typing import Any

import pytest

from mlpipes.errors import DiskFullError
from mlpipes.store.messages import Finished, read_messages
from mlpipes.training import disk_full
from mlpipes.training.checkpoints import Checkpoints
from mlpipes_tests import disks
from mlpipes_tests.disks import fill
from mlpipes_tests.training.harness import curve, make_job, run_here

small_disk = disks.small_disk
SCALE = "w1-b128-e4-g0"


def test_a_training_waits_for_room_and_ends_in_the_same_model(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_full, "RETRY_SECONDS", 0.01)
    expected = run_here(make_job(tmp_path / "reference", SCALE))
    job = make_job(small_disk / "store", SCALE)
    original, ballasts, failures = Checkpoints.save, list[Path](), list[Exception]()

    def save(self: Checkpoints, *arguments: Any) -> Path:
        if not ballasts:
            ballasts.append(fill(small_disk))
        elif len(failures) == 3:
            ballasts[0].unlink(missing_ok=True)
        try:
            return original(self, *arguments)
        except Exception as error:
            failures.append(error)
            raise

    monkeypatch.setattr(Checkpoints, "save", save)
    outcome = run_here(job)
    assert len(failures) == 3
    assert outcome["weights_digest"] == expected["weights_digest"]
    assert curve(outcome) == curve(expected)
    assert not list(small_disk.rglob(".tmp*"))
    # The last message is whole, whatever became of those that were written while there was no room.
    assert isinstance(read_messages(job.folder.messages(1))[0][-1], Finished)


def test_without_room_a_training_fails_clearly_and_keeps_its_last_checkpoint(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_full, "RETRY_SECONDS", 0.05)
    job = make_job(small_disk / "store", SCALE, every_steps=3)
    original, ballasts = Checkpoints.save, []

    def save(self: Checkpoints, *arguments: Any) -> Path:
        if len(self.steps()) == 2:
            ballasts.append(fill(small_disk))
        return original(self, *arguments)

    patience = disk_full.write_with_patience.__defaults__
    assert patience is not None
    monkeypatch.setattr(disk_full.write_with_patience, "__defaults__", (0.3,))
    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(DiskFullError, match=r"is full.*last good checkpoint is kept.*Make room"):
        run_here(job)
    checkpoints = Checkpoints(job.folder.checkpoints)
    assert checkpoints.load(checkpoints.steps()[-1])
    for ballast in ballasts:
        ballast.unlink(missing_ok=True)
    monkeypatch.setattr(Checkpoints, "save", original)
    assert run_here(job)["resumed_from_step"] == 6


def test_other_errors_are_not_waited_for(tmp_path: Path) -> None:
    def write() -> None:
        raise PermissionError(errno.EACCES, "not yours")

    with pytest.raises(PermissionError):
        disk_full.write_with_patience(write, tmp_path, 10**15, lambda *_, **__: None, patience_seconds=0)


@pytest.mark.parametrize(
    ("error", "needed", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 0, True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 0, True),
        (OSError(errno.EIO, "broken"), 10**15, False),
        (RuntimeError("unexpected pos 704 vs 598"), 10**15, True),
        (RuntimeError("unexpected pos 704 vs 598"), 0, False),
        (Exception("I/O error: No space left on device (os error 28)"), 0, True),
    ],
)
def test_a_full_disk_is_told_from_other_errors(tmp_path: Path, error: Exception, needed: int, full: bool) -> None:
    assert disk_full.is_disk_full(error, tmp_path, needed) is full
