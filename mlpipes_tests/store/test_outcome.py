"""The outcome as a record: the same JSON back, older ones open, others are said to be of another version."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mlpipes.errors import CorruptionError, FormatError
from mlpipes.orchestration.training import finished
from mlpipes.store.files import read_record, write_record
from mlpipes.store.layout import TrainingFolder
from mlpipes.store.outcome import Best, Outcome

WRITTEN: dict[str, Any] = {
    "steps": 4, "steps_per_epoch": 2, "best": {"step": 2, "epoch": 1, "metrics": {"loss": 0.5, "accuracy": 1.0}},
    "weights_digest": "w", "order_digest": "o", "loss_digest": "l", "precision": "fp32", "train_seconds": 2.0,
    "history": [["train/loss", 0.25, 4, 1700000000000]], "trail": [[4, "o", "l"]], "samples": 32,
    "samples_per_second": 16.0, "parameters": 7, "resumed_from_step": 0, "fingerprint": "f", "attempt": 1,
    "environment": {"device": "cpu", "libraries": {"torch": "2"}, "threads": 1, "git": None},
    "usage": {
        "cpu_seconds_per_second": 1.0, "peak_memory_bytes": 5, "peak_gpu_memory_bytes": 0, "gpu_utilisation": None
    },
}  # fmt: skip


def test_what_is_read_and_written_again_is_the_same_bytes(tmp_path: Path) -> None:
    write_record(tmp_path / "a.json", WRITTEN)
    outcome = Outcome.read(tmp_path / "a.json")
    assert outcome.best == Best(step=2, epoch=1, metrics={"loss": 0.5, "accuracy": 1.0})
    assert outcome.history == [("train/loss", 0.25, 4, 1700000000000)]
    outcome.write_to(tmp_path / "b.json")
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a.json").read_bytes()


def test_older_and_newer_outcomes_open(tmp_path: Path) -> None:
    older = {name: value for name, value in WRITTEN.items() if name not in ("usage", "trail")}
    write_record(tmp_path / "a.json", older | {"from_tomorrow": 1})
    outcome = Outcome.read(tmp_path / "a.json")
    assert outcome.usage is None
    assert outcome.trail == []


def test_a_figure_that_is_no_number_is_refused_not_written_as_nothing(tmp_path: Path) -> None:
    outcome = Outcome.model_validate(WRITTEN | {"history": [["train/loss", math.nan, 1, 1]]})
    with pytest.raises(ValueError, match="Out of range float"):
        outcome.write_to(tmp_path / "a.json")
    assert not (tmp_path / "a.json").exists()


def test_an_outcome_of_another_version_is_named_and_left_a_corrupt_one_quarantined(tmp_path: Path) -> None:
    folder = TrainingFolder(tmp_path)
    write_record(folder.result, {name: value for name, value in WRITTEN.items() if name != "weights_digest"})
    with pytest.raises(FormatError, match=r"result\.json was written by another version.*weights_digest.*fresh: true"):
        finished(folder)
    assert read_record(folder.result)["steps"] == 4
    envelope = json.loads(folder.result.read_bytes())
    envelope["content"]["steps"] = 5
    folder.result.write_text(json.dumps(envelope))
    with pytest.raises(CorruptionError):
        Outcome.read(folder.result)
    assert finished(folder) is None
    assert (tmp_path / "result.json.corrupt-1").exists()
