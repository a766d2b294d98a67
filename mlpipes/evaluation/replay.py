"""Replay: a finished training done again elsewhere, from its source data on, and compared with the first one."""

import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlpipes.errors import ConfigError, TrainingFailedError
from mlpipes.scales import RayScaleConfig
from mlpipes.store.layout import Store, TrainingFolder
from mlpipes.store.outcome import Outcome
from mlpipes.store.recipe import Recipe
from mlpipes.store.training_job import Checkpointing, TrainingJob
from mlpipes.training.code_version import code_version

if TYPE_CHECKING:
    from mlpipes.compute.jobs import Event, Jobs

DIGESTS = ("order_digest", "loss_digest", "weights_digest")


@dataclass
class Comparison:
    """What a replay found."""

    fingerprint: str
    digests: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Name of what was compared: (recorded, replayed). Empty text: not reached."""
    first_difference: str = ""
    """Where the two trainings part; empty if they do not."""
    differences: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Of code and environment: (recorded, here)."""
    seconds: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether data, order, every loss and the weights are the same, bit for bit."""
        return all(recorded == replayed for recorded, replayed in self.digests.values())

    def markdown(self) -> str:
        """The comparison as a table, for people."""
        verdict = "**equal**, bit for bit" if self.equal else f"**different**: {self.first_difference}"
        rows = [
            f"| {name} | {old[:16]} | {new[:16] or 'not reached'} | {'equal' if old == new else 'DIFFERENT'} |"
            for name, (old, new) in self.digests.items()
        ]
        changes = [f"| {name} | {old} | {new} |" for name, (old, new) in self.differences.items()]
        return "\n".join(
            [
                f"Training {self.fingerprint[:12]}, replayed in {self.seconds:.0f} s (start-up included): {verdict}",
                "",
                "| compared | recorded | replayed | |",
                "| --- | --- | --- | --- |",
                *rows,
                "",
                *(
                    ["| code and environment | recorded | here |", "| --- | --- | --- |", *changes]
                    if changes
                    else ["Code and environment are those of the first training."]
                ),
            ]
        )


def replay(
    store: Store,
    folder: TrainingFolder,
    connect: Callable[[RayScaleConfig], "Jobs"],
    progress: Callable[["Event"], None] = lambda _: None,
) -> Comparison:
    """Build the snapshot and train again, in a folder of its own that is removed afterwards, and compare everything.

    Nothing in the store, in MLflow or in Dagster is touched. Raises ConfigError if the training has not finished, and
    TrainingFailedError if the replay fails.
    """
    from mlpipes.data.snapshot import snapshot_of
    from mlpipes.workloads.catalog import load_workload

    began = time.monotonic()
    try:
        recipe, first = Recipe.read(folder.recipe), Outcome.read(folder.result)
    except FileNotFoundError as error:
        raise ConfigError(
            f"the training {folder.fingerprint[:12]} has not finished; there is nothing to compare"
        ) from error
    found = Comparison(folder.fingerprint)
    if (code := code_version(recipe.implementation)) != recipe.code:
        found.differences["code"] = (recipe.code, code)
    with _scratch(store) as scratch:
        workload = load_workload(recipe.implementation)
        dataset = workload.source.load()
        snapshot, _ = snapshot_of(scratch, dataset.digest(), workload, loaded=dataset)
        del dataset  # not while it trains
        found.digests = {"snapshot": (recipe.snapshot, snapshot.digest)} | {k: (getattr(first, k), "") for k in DIGESTS}
        if snapshot.digest != recipe.snapshot:
            found.first_difference = "the snapshot built from the source is another one, so nothing was trained"
        else:
            job = TrainingJob(
                recipe=recipe, store=str(scratch.root), attempt=1, checkpointing=Checkpointing(every_seconds=None)
            )
            recipe.write_to(job.folder.recipe)
            jobs = connect(recipe.scale)
            handle = jobs.attach_or_submit(job, f"replay-{folder.fingerprint[:16]}-{secrets.token_hex(4)}")
            try:
                for event in jobs.follow(handle, job.folder):
                    progress(event)
            except BaseException:
                jobs.stop(handle)
                raise
            try:
                second = Outcome.read(job.folder.result)
            except FileNotFoundError as error:
                raise TrainingFailedError(
                    f"the replay ended without a result. Its log:\n{jobs.logs(handle, job.folder)[-3000:]}"
                ) from error
            found.digests |= {name: (getattr(first, name), getattr(second, name)) for name in DIGESTS}
            found.first_difference = _first_difference(first, second)
            found.differences |= _differences(_environment(first), _environment(second))
    found.seconds = time.monotonic() - began
    return found


@contextmanager
def _scratch(store: Store) -> Iterator[Store]:
    """A store of its own beside the real one, so that it is on storage that the cluster's nodes share."""
    home = store.root.parent / "replays" / secrets.token_hex(6)
    try:
        yield Store(home / "store")
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _first_difference(first: Outcome, second: Outcome) -> str:
    """Where two outcomes part: a step, or the few steps between two logged points; empty if nowhere."""
    if all(getattr(first, name) == getattr(second, name) for name in DIGESTS):
        return ""
    before = 0
    for (step, order, loss), (_, other_order, other_loss) in zip(first.trail, second.trail, strict=False):
        if (order, loss) != (other_order, other_loss):
            where = f"step {step}" if step == before + 1 else f"a step from {before + 1} to {step}"
            return f"{where}: {_which(order != other_order, first, second, step)}"
        before = step
    if len(first.trail) != len(second.trail):
        return f"{first.steps} steps were done, and {second.steps} now; or the first training kept no trail of them"
    return f"the last update, after {first.steps} steps of equal data and losses"


def _which(order: bool, first: Outcome, second: Outcome, step: int) -> str:
    if order:
        return "other rows were read, or in another order"
    was, now = (
        next((row[1] for row in outcome.history if row[0] == "train/loss" and row[2] == step), None)
        for outcome in (first, second)
    )
    return (
        f"train/loss was {was!r}, and is {now!r} now"
        if was != now
        else "the loss of a step, by less than its curve shows"
    )


def _environment(outcome: Outcome) -> dict[str, Any]:
    return {**outcome.environment, "precision": outcome.precision}


def _differences(old: Any, new: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Leaves of two JSON values that differ, by their path."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = {}
        for key in [*old, *(key for key in new if key not in old)]:
            found |= _differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
        return found
    return {} if old == new else {name: (old, new)}
