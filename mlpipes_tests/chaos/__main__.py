"""`make chaos N=20`: all faults at N random moments each, with a table at the end; exits with 1 if anything differed.

Arguments: N, the first seed, and the faults (default: all).
"""

import signal
import statistics
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from mlpipes_tests.chaos.faults import DISK, VICTIMS
from mlpipes_tests.chaos.session import Session
from mlpipes_tests.chaos.trial import Trial, run_trial


def main(count: int, first_seed: int, victims: Sequence[str]) -> int:
    """Run the trials one after the other; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # also in the background of a shell, where SIGINT is ignored
        signal.signal(number, signal.default_int_handler)
    trials: list[Trial] = []
    with (
        tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder,
        Session(Path(folder), disk_can_be_full=DISK in victims) as session,
    ):
        for seed in range(first_seed, first_seed + count):
            for victim in victims:
                try:
                    trials.append(run_trial(session, victim, seed))
                except Exception as error:
                    traceback.print_exc()
                    trials.append(Trial(victim, seed, problem=f"{type(error).__name__}: {error}"))
                print(trials[-1], flush=True)
    print(f"\n{table(trials)}")
    return int(any(trial.problem for trial in trials))


def table(trials: Sequence[Trial]) -> str:
    """The trials by fault, as Markdown."""
    lines = [
        "| fault | same model | s to re-attach | s to training | s to the end | jobs, max | steps repeated, max |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for victim in dict.fromkeys(trial.victim for trial in trials):
        mine = [trial for trial in trials if trial.victim == victim]
        lines.append(
            f"| {victim} | {sum(not trial.problem for trial in mine)}/{len(mine)} "
            f"| {_spread([trial.attached_seconds for trial in mine])} "
            f"| {_spread([trial.training_seconds for trial in mine])} "
            f"| {_spread([trial.total_seconds for trial in mine])} | {max(trial.attempts for trial in mine)} "
            f"| {max(trial.steps_repeated for trial in mine)} |"
        )
    return "\n".join(lines)


def _spread(seconds: Sequence[float | None]) -> str:
    known = [value for value in seconds if value is not None]
    return f"{statistics.median(known):.0f} (max {max(known):.0f}, n {len(known)})" if known else "–"


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, sys.argv[3:] or VICTIMS))
