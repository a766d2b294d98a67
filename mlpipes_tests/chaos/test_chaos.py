"""A short selection of the chaos harness; `make chaos N=20` runs all victims."""

import shutil
from collections.abc import Iterator

import pytest

from mlpipes_tests.chaos.harness import Session
from mlpipes_tests.conftest import missing
from mlpipes_tests.sandbox import CHECKOUT


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    if not (CHECKOUT / ".venv" / ".installed").is_file() or shutil.which("bash") is None:
        missing("`make install` was not run in this checkout")
    with Session(tmp_path_factory.mktemp("chaos")) as made:
        yield made


@pytest.mark.parametrize("victim", ["run worker", "train worker", "everything"])
def test_whatever_is_killed_the_same_model_comes_out(session: Session, victim: str) -> None:
    trial = session.trial(victim, seed=1)
    assert trial.killed
    assert trial.problem == "", str(trial)
