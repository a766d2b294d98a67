"""A short selection of the chaos harness; `make chaos N=20` runs all victims."""

import shutil
from collections.abc import Iterator

import pytest

from mlpipes.store.messages import Resumed, Stopping, read_messages
from mlpipes.training.checkpoints import Checkpoints
from mlpipes_tests.chaos.session import Session
from mlpipes_tests.chaos.trial import run_trial
from mlpipes_tests.conftest import missing
from mlpipes_tests.sandbox import CHECKOUT

pytestmark = pytest.mark.chaos
PLACE = 0.5
"""Where the trainings wait for their fault."""


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    if not (CHECKOUT / ".venv" / ".installed").is_file() or shutil.which("bash") is None:
        missing("`make install` was not run in this checkout")
    scales = (f"w{workers}-b128-e12-g0" for workers in (2, 1))
    with Session(tmp_path_factory.mktemp("chaos"), scale=next(scales), reference=next(scales)) as made:
        yield made


@pytest.mark.parametrize("victim", ["run worker", "everything"])
def test_whatever_is_killed_the_same_model_comes_out(session: Session, victim: str) -> None:
    trial = run_trial(session, victim, seed=1, place=PLACE)
    assert trial.problem == "", str(trial)
    assert trial.attempts == (1 if victim == "run worker" else 2)


def test_cancel_ends_the_training_after_a_last_checkpoint_and_it_can_go_on(session: Session) -> None:
    session.until(session.is_ready, "Dagster can launch runs")
    session.sandbox.barriers.close(PLACE)
    run_id = session.launch()
    folder = session.folder_of(run_id)
    session.sandbox.barriers.wait_for(PLACE)
    session.cancel(run_id)
    session.until(folder.stop_request(1).is_file, "a last checkpoint is asked for")
    session.sandbox.barriers.open()
    session.until(lambda: not session.training_processes(folder), "the training's processes have ended")
    session.until(lambda: "CANCELED" in session.family(run_id), "Dagster has cancelled the run")
    assert any(isinstance(message, Stopping) for message in read_messages(folder.messages(1))[0])
    stopped = Checkpoints(folder.checkpoints).steps()[-1]
    session.until(lambda: session.tracked_run(folder)[1].info.status == "KILLED", "MLflow has it as killed")
    session.launch(parent=run_id)
    session.until(lambda: "SUCCESS" in session.family(run_id), "it has been resumed and has ended")
    again = read_messages(folder.messages(2))[0]
    # A hurried training may have come to its end by the time that it looks whether it is to stop.
    left = session.expected["steps"] - stopped
    assert [message.step for message in again if isinstance(message, Resumed)] == [stopped] * bool(left)
    assert session.compare(folder) == ""
