"""A short selection of the chaos harness; `make chaos N=20` runs all victims."""

import shutil
import time
from collections.abc import Iterator

import pytest

from mlpipes.training.checkpoints import Checkpoints
from mlpipes_tests.chaos.harness import Session
from mlpipes_tests.conftest import missing
from mlpipes_tests.sandbox import CHECKOUT


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    if not (CHECKOUT / ".venv" / ".installed").is_file() or shutil.which("bash") is None:
        missing("`make install` was not run in this checkout")
    with Session(tmp_path_factory.mktemp("chaos")) as made:
        yield made


@pytest.mark.parametrize("victim", ["run worker", "everything"])
def test_whatever_is_killed_the_same_model_comes_out(session: Session, victim: str) -> None:
    trial = session.trial(victim, seed=1)
    assert trial.problem == "", str(trial)


def test_cancel_ends_the_training_after_a_last_checkpoint_and_it_can_go_on(session: Session) -> None:
    run_id = session.launch()
    folder = session.folder_of(run_id)
    session.until(lambda: session.last_step(folder) > 20, "it trains")
    session.cancel(run_id)
    began = time.monotonic()
    session.until(lambda: not session.training_processes(folder), "the training's processes have ended", seconds=20)
    assert time.monotonic() - began < 15  # 10 s are the goal; a busy machine gets some more
    session.until(lambda: "CANCELED" in session.family(run_id), "Dagster has cancelled the run", seconds=30)
    messages = folder.messages(1).read_text()
    assert '"kind": "stopping"' in messages
    stopped = Checkpoints(folder.checkpoints).steps()[-1]
    session.until(lambda: session.tracked_run(folder)[1].info.status == "KILLED", "MLflow has it as killed", seconds=20)
    again = session.launch(parent=run_id)
    session.until(lambda: "SUCCESS" in session.family(run_id), f"{again} has gone on to the end", seconds=150)
    assert '"kind": "resumed"' in folder.messages(2).read_text()
    assert f'"step": {stopped}' in folder.messages(2).read_text()
    assert session.compare(folder) == ""
