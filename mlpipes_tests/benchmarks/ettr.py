"""Benchmark: effective training time under random faults, and what it would be for who goes on at the last epoch.

The effective training time ratio (ETTR) is useful step time ÷ wall time (Kokolis et al. 2024, arXiv:2410.21680): a step
counts once, however often it was computed, and starting, evaluating and waiting for a checkpoint are not useful. Run as
`python -m mlpipes_tests.benchmarks.ettr [SECONDSxFAULTS …]`, such as `60x20 300x6`: a training of two workers under
`mlpipes dev`, of which something is killed (-9) every so many seconds, chosen at random; then the training is cancelled. Its
evaluations are short (`ettr_workload`).
"""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

from mlpipes.store.layout import TrainingFolder
from mlpipes.store.messages import Message, Progressed, Resumed, Started
from mlpipes_tests.benchmarks.figures import record
from mlpipes_tests.chaos.faults import processes, strike
from mlpipes_tests.chaos.session import Session

WORKLOAD, BATCH = "docstrings", 64
DEFINITIONS = "mlpipes_tests.benchmarks.ettr_definitions"
SCALE = f"w2-b{BATCH}-e400-g0"
"""Longer than any measurement, and not much: a training tells of two thousand of its steps at most, every few seconds so."""
VICTIMS = ("train worker", "Ray driver", "Train controller", "raylet", "Ray head", "run worker")
RARE_SECONDS = 3600.0
LONG_EPOCH_SECONDS = 600.0
_MANY = {"dagster/max_retries": "1000"}
"""A run that is killed is repeated three times by default; here it is killed more often than anybody's."""


@dataclass(frozen=True)
class Measured:
    """What happened, all times in Unix seconds."""

    launched: float
    faults: list[float]
    victims: list[str]
    ended: float
    useful: list[tuple[float, float]]
    """Times, and the useful seconds of steps up to then, which grow."""
    downs: list[float]
    """Of each fault, the seconds until the workers were there again; 0 where they did not notice."""
    epoch_seconds: float

    def useful_until(self, at: float) -> float:
        """Useful seconds up to a time."""
        return max((seconds for when, seconds in self.useful if when <= at), default=0.0)

    @property
    def ratio(self) -> float:
        """ETTR from the launch to the end."""
        return self.useful_until(self.ended) / (self.ended - self.launched)

    @property
    def undisturbed(self) -> float:
        """The same from the first step to the first fault: what evaluations and checkpoints leave."""
        (begun, already), first = self.useful[0], self.faults[0]
        return (self.useful_until(first) - already) / (first - begun)

    @property
    def lost(self) -> list[float]:
        """Useful seconds that each fault cost: those that were repeated, and those in which nothing was computed."""
        windows = pairwise([*self.faults, self.ended])
        return [
            (end - begin) * self.undisturbed - (self.useful_until(end) - self.useful_until(begin))
            for begin, end in windows
        ]

    def ratio_at(self, every: float) -> float:
        """ETTR with a fault every so many seconds, computed from what one cost here."""
        return self.undisturbed - statistics.fmean(self.lost) / every


def measured(
    messages: Sequence[Message], launched: float, faults: list[float], victims: list[str], ended: float
) -> Measured:
    """A measurement from the messages of a training."""
    ordered = sorted(messages, key=lambda message: message.time)
    progress = [message for message in ordered if isinstance(message, Progressed)]
    useful, greatest = [], 0.0
    for message in progress:
        greatest = max(greatest, message.step * BATCH / message.samples_per_second)
        useful.append((message.time, greatest))
    downs = []
    for begin, end in pairwise([*faults, ended]):
        back = [m.time for m in ordered if isinstance(m, Resumed | Started) and begin < m.time <= end]
        downs.append(back[-1] - begin if back else 0.0)
    epoch_seconds = statistics.median(m.step * BATCH / m.samples_per_second / m.epoch for m in progress)
    return Measured(launched, faults, victims, ended, useful, downs, epoch_seconds)


def ratio_of_epochs(found: Measured, epoch_seconds: float) -> float:
    """ETTR of the same faults for who starts as fast, and goes on at the end of the last whole epoch."""
    useful = saved = 0.0
    first = found.useful[0][0]
    for begin, end, down in zip([first, *found.faults], [*found.faults, found.ended], [0.0, *found.downs], strict=True):
        if down:
            useful = saved
        useful += (end - begin - down) * found.undisturbed
        saved = useful // epoch_seconds * epoch_seconds
    return useful / (found.ended - found.launched)


def measure(every: float, faults: int, seed: int = 0) -> Measured:
    """Train under faults."""
    chance = random.Random(seed)  # noqa: S311 - for moments, not secrets
    with (
        tempfile.TemporaryDirectory(prefix="mlpipes-ettr-", ignore_cleanup_errors=True) as folder,
        Session(Path(folder), workload=WORKLOAD, scale=SCALE, reference=None, definitions=DEFINITIONS) as session,
    ):
        session.until(session.is_ready, "Dagster can launch runs")
        launched = time.time()
        run = session.launch(tags=_MANY, mean_seconds_between_failures=every)
        training = session.folder_of(run)
        session.until(lambda: session.last_step(training) > 0, "the training has begun")
        begun, struck, victims = time.time(), list[float](), list[str]()
        for number in range(1, faults + 1):
            time.sleep(max(0.0, begun + number * every - time.time()))
            at, victim = _strike(session, run, training, chance)
            struck.append(at)
            victims.append(victim)
            print(f"{struck[-1] - begun:6.0f} s: {victims[-1]}, at step {session.last_step(training)}", flush=True)
        time.sleep(max(0.0, begun + (faults + 1) * every - time.time()))
        ended = time.time()
        found = measured(session.messages(training), launched, struck, victims, ended)
        for known in session.family_ids(run):
            session.cancel(known)
        session.until(
            lambda: not {"STARTED", "CANCELING", "QUEUED", "STARTING"} & set(session.family(run)), "the run has ended"
        )
    return found


def _strike(session: Session, run: str, folder: TrainingFolder, chance: random.Random) -> tuple[float, str]:
    """Kill something that is there; returns when, and what.

    No more is looked up than has to be: the process of a run is found in all of its events, which takes Dagster seconds
    where a training has told of thousands of steps, of what the training computes with, too.
    """
    for victim in chance.sample(VICTIMS, len(VICTIMS)):
        for struck in session.family_ids(run) if victim == VICTIMS[-1] else [run]:
            if _alive(processes(session, victim, struck)):
                at = time.time()
                strike(session, victim, struck, folder, chance)
                return at, victim
    return time.time(), "nothing, for nothing was there"


def _alive(found: Sequence[psutil.Process]) -> bool:
    return any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in found)


def main(asked: Sequence[str]) -> int:
    """Measure and print; returns the exit code."""
    for words in asked or ("60x20", "300x6"):
        every, _, faults = words.partition("x")
        found = measure(float(every), int(faults))
        lost = found.lost
        epochs = {
            f"its epochs, of {found.epoch_seconds:.0f} s": found.epoch_seconds,
            f"epochs of {LONG_EPOCH_SECONDS:.0f} s": LONG_EPOCH_SECONDS,
        }
        name = f"a fault every {every} s"
        record(f"ETTR, {name}", "share of the wall time", [found.ratio])
        record(f"seconds lost to a fault, {name}", "s", lost)
        record(f"ETTR, a fault every {RARE_SECONDS:.0f} s, computed from {name}", "share", [found.ratio_at(3600.0)])
        print(
            f"\n{name}, {faults} faults: ETTR {found.ratio:.3f} in {found.ended - found.launched:.0f} s, start-up included; "
            f"{found.undisturbed:.3f} before the first fault; computed for one every {RARE_SECONDS:.0f} s: "
            f"{found.ratio_at(RARE_SECONDS):.3f}"
        )
        for label, seconds in epochs.items():
            ratio = ratio_of_epochs(found, seconds)
            record(f"ETTR, {name}, going on at the end of {label.split(',')[0]}", "share of the wall time", [ratio])
            print(f"  going on at the end of {label}: {ratio:.3f}")
        print(
            "| killed | n | useful s lost, median (most) | s until workers were there again, median |\n"
            "| --- | --- | --- | --- |"
        )
        for victim in dict.fromkeys(found.victims):
            mine = [number for number, other in enumerate(found.victims) if other == victim]
            losses, downs = [lost[n] for n in mine], [found.downs[n] for n in mine]
            print(
                f"| {victim} | {len(mine)} | {statistics.median(losses):.1f} ({max(losses):.1f}) "
                f"| {statistics.median(downs):.1f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
