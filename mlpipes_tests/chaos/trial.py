"""A trial: launch a training in Dagster, let a fault happen at a random moment, wait, and compare everything."""

import random
import time
from dataclasses import dataclass

from mlpipes.store.layout import TrainingFolder
from mlpipes.store.messages import EpochEnded, Progressed, Resumed, Started
from mlpipes_tests.chaos.faults import AWAY_SECONDS, DISK, HUNG, KILLED, SNAPSHOT_BYTE, mend, processes, strike
from mlpipes_tests.chaos.session import Session
from mlpipes_tests.waiting import LIMIT_SECONDS

DEADLINE_SECONDS = LIMIT_SECONDS
STALL_SECONDS = 60
"""More than the start of a training is silent for on a busy machine of two cores."""


class UnexpectedEndError(Exception):
    """A run ended in a way that it should not."""


@dataclass
class Trial:
    """What one trial found."""

    victim: str
    seed: int
    done: str = ""
    """What the fault was in particular."""
    problem: str = ""
    attempts: int = 0
    attached_seconds: float | None = None
    """From the fault until a run followed the training (again), where the fault ended the one that did."""
    training_seconds: float | None = None
    """From the fault until the training went on, start-up included; none if it ended in the meantime."""
    total_seconds: float = 0.0
    """From the fault until the run had succeeded."""
    steps_repeated: int = 0

    def __str__(self) -> str:
        figures = [
            f"{self.total_seconds:.0f} s to the end",
            f"{self.attempts} job(s), {self.steps_repeated} steps repeated",
        ]
        if self.attached_seconds is not None:
            figures.insert(0, f"{self.attached_seconds:.1f} s to re-attach")
        if self.training_seconds is not None:
            figures.insert(0, f"{self.training_seconds:.1f} s to training")
        return f"{self.victim:22s} seed {self.seed}: {self.problem or 'same model'} ({self.done}); {', '.join(figures)}"


def run_trial(session: Session, victim: str, seed: int, place: float | None = None) -> Trial:
    """Launch, let the fault happen, wait, compare.

    It happens at a random moment or, given a place (a fraction of the steps), while the training waits there; it goes
    on when a run follows it again.
    """
    trial, chance = Trial(victim, seed), random.Random(f"{victim}-{seed}")  # noqa: S311 - for moments, not secrets
    session.until(session.is_ready, "Dagster can launch runs")
    if place is not None:
        session.sandbox.barriers.close(place)
    run_id = session.launch(stall_seconds=STALL_SECONDS if victim in HUNG else 900)
    folder = session.folder_of(run_id)
    session.until(lambda: folder.messages(1).is_file(), "the training's driver has started")
    if place is None:
        _random_moment(session, victim, run_id, folder, chance)
    else:
        session.sandbox.barriers.wait_for(place)
    struck_at, step = time.time(), session.last_step(folder)
    trial.done = strike(session, victim, run_id, folder, chance)
    try:
        _recover(session, run_id, victim, struck_at)
        trial.problem = session.compare(folder)
    except (AssertionError, UnexpectedEndError) as error:
        trial.problem = str(error)
        for status_run in session.family(run_id):
            if status_run not in ("SUCCESS", "FAILURE", "CANCELED"):
                session.cancel(run_id)
    trial.total_seconds = time.time() - struck_at
    _measure(session, trial, run_id, folder, struck_at, step)
    return trial


def _random_moment(session: Session, victim: str, run_id: str, folder: TrainingFolder, chance: random.Random) -> None:
    """Wait for a moment at which the victim is there: while things start, or at some step of the training."""
    session.until(lambda: victim == DISK or bool(processes(session, victim, run_id)), f"{victim} is there")
    if victim in KILLED and victim != "train worker" and chance.random() < 0.3:
        time.sleep(chance.uniform(0, 8))
        return
    step = chance.uniform(0.02, 0.8) * session.expected["steps"]
    session.until(lambda: session.last_step(folder) >= step, f"the training is at step {step:.0f}")


def _recover(session: Session, run_id: str, victim: str, struck_at: float) -> None:
    statuses: list[str] = []
    mended = asked_again = False
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        if not mended and time.time() - struck_at > AWAY_SECONDS.get(victim, 0):
            mend(session, victim)
            mended = True
        if session.dev is None or session.dev.poll() is not None:
            session.up()  # the one thing that a user has to do
        if session.attached(run_id, struck_at):
            session.sandbox.barriers.open()
        statuses = session.family(run_id)
        if "SUCCESS" in statuses:
            return
        if statuses and set(statuses) == {"FAILURE"} and session.final_failure(run_id):
            message = session.failure(run_id)
            if victim != SNAPSHOT_BYTE or "Materialize `snapshot`" not in message or asked_again:
                raise UnexpectedEndError(f"failed: {message[:500]}")
            asked_again = True  # what the message says: the user materializes the chain again
            session.launch(parent=run_id)
        time.sleep(1)
    raise UnexpectedEndError(f"not done after {DEADLINE_SECONDS} s: runs {statuses}")


def _measure(session: Session, trial: Trial, run_id: str, folder: TrainingFolder, struck_at: float, step: int) -> None:
    trial.attempts = len(list(folder.messages(0).parent.glob("a*.jsonl")))
    later = [m for m in session.messages(folder) if m.time > struck_at]
    begun = [m for m in later if isinstance(m, Resumed | Started)]
    progress = [m.time for m in later if isinstance(m, Progressed | EpochEnded) and m.time > struck_at + 0.5]
    if begun:
        progress = [at for at in progress if at > begun[-1].time]
        trial.steps_repeated = max(0, step - begun[-1].step)
    if progress:
        trial.training_seconds = min(progress) - struck_at
    attached = session.attached(run_id, struck_at)
    trial.attached_seconds = min(attached) - struck_at if attached else None
