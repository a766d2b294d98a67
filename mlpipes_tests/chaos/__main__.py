"""`make chaos N=20`: all victims at N random moments each, with a table at the end; exits with 1 if anything differed."""

import statistics
import sys
import tempfile
from pathlib import Path

from mlpipes_tests.chaos.harness import VICTIMS, Session, Trial


def main(count: int, first_seed: int, victims: list[str]) -> int:
    """Run the trials one after the other; returns the exit code."""
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, Session(Path(folder)) as session:
        for seed in range(first_seed, first_seed + count):
            for victim in victims:
                try:
                    trials.append(session.trial(victim, seed))
                except Exception as error:
                    trials.append(Trial(victim, seed, problem=f"{type(error).__name__}: {error}"))
                print(trials[-1], flush=True)
    print(
        "\n| victim | same model | s to recovery, median (max) | s to the end, median | jobs, max | steps repeated, max |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for victim in victims:
        mine = [trial for trial in trials if trial.victim == victim]
        recovery = [trial.recovery_seconds for trial in mine]
        print(
            f"| {victim} | {sum(not trial.problem for trial in mine)}/{len(mine)} | {statistics.median(recovery):.1f} "
            f"({max(recovery):.1f}) | {statistics.median(trial.total_seconds for trial in mine):.0f} | "
            f"{max(trial.attempts for trial in mine)} | {max(trial.steps_repeated for trial in mine)} |"
        )
    return int(any(trial.problem for trial in trials))


if __name__ == "__main__":
    number, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    sys.exit(main(number, seed, sys.argv[3:] or list(VICTIMS)))
