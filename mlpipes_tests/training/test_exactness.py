"""Any number of workers, any interruption: the same model, bit for bit; and what would be wrong does not pass."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlpipes.errors import CorruptionError, TrainingFailedError
from mlpipes.scales import RayScaleConfig
from mlpipes.training.checkpoints import Checkpoints
from mlpipes.training.determinism import DataOrder
from mlpipes.training.loop import Trainer
from mlpipes.training.parallel import shares
from mlpipes_tests.data.test_snapshot import write_cifar
from mlpipes_tests.training.harness import curve, make_job, run, run_here

CIFAR10 = "mlpipes.workloads.image_classification:cifar10"
SAME = ("weights_digest", "order_digest", "loss_digest", "steps", "best")


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[key] == b[key] for key in SAME) and curve(a) == curve(b)


def weights(job: Any) -> dict[str, torch.Tensor]:
    checkpoints = Checkpoints(job.folder.checkpoints)
    state = checkpoints.load(checkpoints.steps()[-1]).model_state()
    return {name: tensor for name, tensor in state.items() if "running_" not in name and "num_batches" not in name}


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def test_any_number_of_workers_gives_the_same_bits(tmp_path: Path) -> None:
    whole, *others = [run(make_job(tmp_path / str(n), "w1-b64-e3-g0"), workers=n) for n in (1, 2, 3, 4)]
    assert whole["steps"] >= 50
    assert all(equal(whole, other) for other in others)


@pytest.mark.parametrize("workers", [2, 4])
def test_allreduce_agrees_to_rounding(tmp_path: Path, workers: int) -> None:
    # With other seeds an activation may lie so close to a kink that rounding decides its side, and a gradient jumps: the
    # same engine started from weights 3e-8 apart stays within 1.2e-7 at seeds 0, 1 and 3, and ends 5.5e-5 apart at seed 2.
    options = {"reduction": "allreduce", "optimizer": "sgd", "learning_rate": 0.001, "seed": 1}
    alone, together = (make_job(tmp_path, f"w{n}-b64-e3-g0", **options) for n in (1, workers))
    assert run(alone)["steps"] >= 50
    run(together)
    assert furthest(weights(alone), weights(together)) <= 1e-6


@pytest.mark.parametrize("reduction", ["ordered", "allreduce"])
def test_discarding_the_other_workers_would_be_noticed(tmp_path: Path, reduction: str) -> None:
    options = {"reduction": reduction, "optimizer": "sgd", "learning_rate": 0.001}
    alone, wrong = (make_job(tmp_path, f"w{n}-b64-e3-g0", **options) for n in (1, 2))
    run(alone)
    run(wrong, discard=True)
    assert furthest(weights(alone), weights(wrong)) > 1e-5


@pytest.mark.parametrize(("workers", "reduction"), [(1, "ordered"), (2, "ordered"), (4, "allreduce")])
def test_crashed_in_mid_epoch_and_resumed_equals_uninterrupted(tmp_path: Path, workers: int, reduction: str) -> None:
    scale = f"w{workers}-b64-e2-g0"
    whole = run(make_job(tmp_path / "whole", scale, reduction=reduction))
    job = make_job(tmp_path / "crashed", scale, reduction=reduction, every_steps=3)
    run(job, crash=5)  # back to step 3, in mid-epoch
    run(job, crash=31)
    outcome = run(job)
    assert outcome["resumed_from_step"] == 30
    assert equal(whole, outcome)


def test_cifar10_crashed_in_mid_epoch_and_resumed_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own network and recipe (whitening, Muon, augmentation, bf16 where there is), on noise in the standard layout.

    The crashes are before and after the step from which on its images are whole, the fifth of eight.
    """
    noise, names = np.random.default_rng(0), [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    labels = [n % 10 for n in range(60)]
    batches = {name: {b"data": noise.integers(0, 256, (60, 3072), np.uint8), b"labels": labels} for name in names}
    monkeypatch.setenv("MLPIPES_CIFAR10", str(write_cifar(tmp_path / "data", **batches)))
    whole = run_here(make_job(tmp_path / "whole", "w1-b64-e2-g0", CIFAR10, shrink=0.625))
    for workers, crash in ((1, 3), (2, 6)):
        job = make_job(tmp_path / f"crashed{workers}", f"w{workers}-b64-e2-g0", CIFAR10, every_steps=1, shrink=0.625)
        run(job, crash=crash)
        outcome = run(job)
        assert outcome["resumed_from_step"] == crash
        assert outcome["steps_per_epoch"] == 4
        assert equal(whole, outcome)


def test_gaining_and_losing_workers_on_the_way_changes_nothing(tmp_path: Path) -> None:
    whole = run(make_job(tmp_path / "whole", "w1-b64-e2-g0"))
    job = make_job(tmp_path / "elastic", "w1-b64-e2-g0", every_steps=3)
    run(job, workers=2, crash=8)
    run(job, workers=3, crash=22)
    assert equal(whole, run(job, workers=1))


def test_random_numbers_that_others_draw_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_here(make_job(tmp_path / "whole", "w1-b128-e1-g0"))
    step = Trainer._step

    def after_others(trainer: Trainer) -> None:
        torch.rand(3)
        random.random()  # noqa: S311 - no secret
        np.random.rand()
        step(trainer)

    monkeypatch.setattr(Trainer, "_step", after_others)
    assert equal(whole, run_here(make_job(tmp_path / "disturbed", "w1-b128-e1-g0")))


def test_threads_that_the_environment_asks_for_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 256 rows in one shard are summed in another order by two threads than by one.
    options = {"logical_shards": 1, "every_steps": None}
    whole, used = run_here(make_job(tmp_path / "whole", "w1-b512-e1-g0", **options)), set[int]()
    step, threads = Trainer._step, torch.get_num_threads()
    monkeypatch.setattr(Trainer, "_step", lambda self: (used.add(torch.get_num_threads()), step(self))[1])
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        assert equal(whole, run_here(make_job(tmp_path / "other", "w1-b512-e1-g0", **options)))
    finally:
        torch.set_num_threads(threads)
    assert used == {1}, "as the scale says, whatever was set before"


def test_a_resumed_training_goes_on_with_the_schedule_and_the_optimizers_memory(tmp_path: Path) -> None:
    """Each forgotten alone makes another model, so equality after a crash is not owed to their not mattering."""
    whole = run_here(make_job(tmp_path / "whole", "w1-b128-e2-g0"))
    for number, forget in enumerate((_schedule, _memory)):
        job = make_job(tmp_path / f"forgetful{number}", "w1-b128-e2-g0")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "_finish_epoch", _stop_after(Trainer._finish_epoch))
            with pytest.raises(_CrashError):
                run_here(job)
        with pytest.MonkeyPatch.context() as patch:
            resume = Trainer.resume

            def forgetful(trainer: Trainer, resume: Any = resume, forget: Any = forget) -> None:
                resume(trainer)
                forget(trainer)

            patch.setattr(Trainer, "resume", forgetful)
            assert not equal(whole, run_here(job))
        shutil.rmtree(job.folder.path)


class _CrashError(Exception):
    pass


def _stop_after(finish: Any) -> Any:
    def finish_and_stop(trainer: Trainer) -> None:
        finish(trainer)
        raise _CrashError

    return finish_and_stop


def _schedule(trainer: Trainer) -> None:
    for group in trainer._groups():
        group["peak_lr"] = group["lr"]


def _memory(trainer: Trainer) -> None:
    for optimizer in trainer.optimizers:
        optimizer.state.clear()


def test_another_seed_is_another_training(tmp_path: Path) -> None:
    a, b = (run_here(make_job(tmp_path, "w1-b128-e1-g0", seed=seed)) for seed in (0, 1))
    assert a["order_digest"] != b["order_digest"]
    assert a["weights_digest"] != b["weights_digest"]


def test_a_corrupt_latest_checkpoint_is_quarantine_and_the_one_before_is_used(tmp_path: Path) -> None:
    whole = run_here(make_job(tmp_path / "whole", "w1-b128-e3-g0"))
    job = make_job(tmp_path / "hurt", "w1-b128-e3-g0")
    run_here(job)
    job.folder.result.unlink()
    checkpoints = Checkpoints(job.folder.checkpoints)
    latest = checkpoints.path(checkpoints.steps()[-1])
    content = bytearray((latest / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 4
    (latest / "model.safetensors").write_bytes(content)
    again = run_here(job)
    assert 0 < again["resumed_from_step"] < again["steps"]
    assert equal(whole, again)
    assert "quarantined as" in job.folder.messages(1).read_text()
    assert (latest.with_name(latest.name + ".corrupt-1") / "model.safetensors").read_bytes() == content


def test_without_any_usable_checkpoint_nothing_is_overwritten(tmp_path: Path) -> None:
    job = make_job(tmp_path, "w1-b128-e2-g0")
    run_here(job)
    job.folder.result.unlink()
    for path in job.folder.checkpoints.iterdir():
        (path / "optimizers.pt").write_bytes(b"torn")
    for _ in range(2):  # also the second time: a retry must not start over in silence
        with pytest.raises(CorruptionError, match="fresh: true"):
            run_here(job)
    assert all(".corrupt-" in path.name for path in job.folder.checkpoints.iterdir())


def test_checkpoints_keep_the_last_and_the_best_in_numeric_order(tmp_path: Path) -> None:
    job = make_job(tmp_path, "w1-b128-e12-g0")
    best = run_here(job)["best"]["step"]
    steps = Checkpoints(job.folder.checkpoints).steps()
    assert steps == sorted({11 * 9, 12 * 9, best})
    (job.folder.checkpoints / "step-123456789").mkdir()
    (job.folder.checkpoints / ".tmp-step-00000999-1-abcd").mkdir()
    assert Checkpoints(job.folder.checkpoints).steps() == [*steps, 123456789]


def test_training_and_selection_never_read_the_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpipes.data.snapshot import Snapshot

    read = []
    original = Snapshot.columns
    monkeypatch.setattr(Snapshot, "columns", lambda self, split: (read.append(split), original(self, split))[1])
    run_here(make_job(tmp_path, "w1-b128-e2-g0"))
    assert set(read) == {"train", "validation"}


def test_the_best_is_chosen_by_validation(tmp_path: Path) -> None:
    job = make_job(tmp_path, "w1-b128-e4-g0")
    outcome = run_here(job)
    validation = {step: value for name, value, step, _ in outcome["history"] if name == "validation/accuracy"}
    assert outcome["best"]["metrics"]["accuracy"] == max(validation.values())
    assert not any("test" in row[0] for row in outcome["history"])


def test_a_loss_that_is_not_finite_ends_the_training_with_one_clear_message(tmp_path: Path) -> None:
    job = make_job(tmp_path, "w1-b64-e2-g0", optimizer="sgd", learning_rate=1e30)
    with pytest.raises(TrainingFailedError, match=r"the loss became (nan|inf) at step \d+ of \d+"):
        run_here(job)
    assert not job.folder.result.exists()


def test_a_batch_in_which_nothing_counts_ends_the_training_with_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlpipes.workloads.image_classification import ImageClassification

    calls = []

    def weight(self: Any, batch: dict[str, torch.Tensor], hp: Any) -> torch.Tensor:
        calls.append(len(batch["label"]))
        return torch.tensor(0.0 if len(calls) > 4 * 6 else float(calls[-1]))  # four shards a step

    monkeypatch.setattr(ImageClassification, "weight", weight)
    job = make_job(tmp_path, "w1-b64-e1-g0")
    with pytest.raises(TrainingFailedError, match=r"nothing counts in the batch of step 7 of \d+: .* sum to 0"):
        run_here(job)
    assert not job.folder.result.exists()


def test_training_seconds_leave_start_up_and_pauses_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow start and slow checkpoints must not show in the speed; they did in the program that this replaces."""
    import time

    from mlpipes.training import loop

    original = loop.Trainer.resume

    def slow_start(self: Any) -> None:
        time.sleep(30)
        original(self)

    clock = [0.0]
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(loop.Trainer, "resume", slow_start)
    step, save = loop.Trainer._step, loop.CheckpointWriter.save
    monkeypatch.setattr(loop.Trainer, "_step", lambda self: (time.sleep(1), step(self))[1])
    monkeypatch.setattr(loop.CheckpointWriter, "save", lambda self, *a: (time.sleep(100), save(self, *a))[1])
    outcome = run_here(make_job(tmp_path, "w1-b128-e2-g0"))
    assert outcome["train_seconds"] == pytest.approx(outcome["steps"])
    assert outcome["samples_per_second"] == pytest.approx(128)


def test_each_epoch_reads_every_row_at_most_once_whoever_computes_it() -> None:
    order = DataOrder(1000, 64, seed=3)
    for epoch in range(3):
        rows = torch.cat([order.batch(epoch, step) for step in range(order.steps_per_epoch)])
        assert len(rows) == len(set(rows.tolist())) == 15 * 64
    assert not torch.equal(order.batch(0, 0), order.batch(1, 0))
    assert torch.equal(DataOrder(1000, 64, seed=3).batch(2, 7), order.batch(2, 7))


@pytest.mark.parametrize(("parts", "workers"), [(4, 1), (4, 2), (4, 3), (4, 4), (7, 3), (2, 4)])
def test_shares_cover_every_part_once(parts: int, workers: int) -> None:
    found = shares(parts, workers)
    assert [part for share in found for part in share] == list(range(parts))
    assert len(found) == workers
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_threads_follow_from_the_scale() -> None:
    assert [RayScaleConfig.from_key(f"w1-b8-e1-g0{c}").threads for c in ("", "-c0.5", "-c4")] == [1, 1, 4]
