"""The training loop: the same for every workload, any number of workers, and before and after a crash."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mlpipes.data.dataset import Columns
from mlpipes.errors import TrainingFailedError
from mlpipes.scales import RayScaleConfig
from mlpipes.store.messages import (
    EpochEnded,
    Message,
    Notify,
    Progressed,
    Resumed,
    Started,
    Stopping,
    Warned,
)
from mlpipes.store.outcome import Best, TrainingResult, Usage
from mlpipes.store.training_job import Checkpointing
from mlpipes.training.checkpoint_writer import CheckpointWriter, MayWrite, seconds_between
from mlpipes.training.checkpoints import Checkpoints, Progress
from mlpipes.training.determinism import (
    DataOrder,
    mixed_seed,
    resolve_precision,
    seed_random_numbers,
    weights_digest,
)
from mlpipes.training.embedding import keep_embedding_gradients
from mlpipes.training.gradient import ShardedGradient
from mlpipes.training.parallel import Workers
from mlpipes.training.prediction import predictions_of
from mlpipes.training.stopwatch import Stopwatch
from mlpipes.workloads.base import DataInfo, Workload
from mlpipes.workloads.tensors import autocast, on_device

LOGGED_POINTS = 1000
"""Points of a loss curve, whatever the length of the training, so that a checkpoint can carry the whole curve."""
_SHORT = 12
"""Characters of a digest that tell two trainings apart."""


class Trainer:
    """One worker's part of a training. All workers hold equal models; rank 0 writes and reports."""

    def __init__(
        self,
        workload: Workload,
        hp: Any,
        scale: RayScaleConfig,
        info: DataInfo,
        train: Columns,
        validation: Columns,
        *,
        seed: int,
        workers: Workers,
        device: torch.device,
        checkpoints: Checkpoints,
        policy: Checkpointing,
        notify: Notify,
        may_write: MayWrite = nullcontext,
        stop_is_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self.workload, self.hp, self.scale, self.workers = workload, hp, scale, workers
        self.checkpoints, self.policy, self.notify = checkpoints, policy, notify
        self.stop_is_asked, self.device = stop_is_asked, device
        self.writer = CheckpointWriter(checkpoints, notify, may_write)
        self.train_columns, self.validation, self.validation_columns = (
            on_device(train, device),
            on_device(validation, device),
            validation,
        )
        rows = len(next(iter(train.values())))
        self.order = DataOrder(rows, scale.batch_size, seed, workload.lengths(train))
        if self.order.steps_per_epoch == 0:
            raise TrainingFailedError(
                f"the global batch size {scale.batch_size} is larger than the training split ({self.order.rows} samples)"
            )
        self.total_steps = self.order.steps_per_epoch * scale.epochs
        self.log_every = max(1, self.total_steps // LOGGED_POINTS)
        seed_random_numbers(mixed_seed(seed, "model"))
        self.model: nn.Module = workload.build_model(hp, info)
        workload.initialize(self.model, hp, train)
        self.model.to(device)
        if workload.sparse_embedding_gradients:
            keep_embedding_gradients(self.model)
        self.optimizers: Sequence[torch.optim.Optimizer] = workload.optimizers(self.model, hp)
        for group in self._groups():
            group["peak_lr"] = group["lr"]
        weighted = type(workload).weight is not Workload.weight
        self.gradient = ShardedGradient(self.model, workers, hp.logical_shards or scale.workers, hp.reduction, weighted)
        self.progress = Progress(seed=seed, precision=resolve_precision(hp.precision, device))
        self._undrained: list[Tensor] = []
        self._stopping = False
        self._last_message = self._last_save = time.perf_counter()
        self.stopwatch = Stopwatch(device)

    def resume(self) -> None:
        """Go back to the latest usable checkpoint, if there is one.

        Rank 0 looks for it, so that all workers take the same one, and only one of them sets corrupt ones aside.
        """
        found = None
        if self.workers.rank == 0:
            found, messages = self.checkpoints.latest()
            for message in messages:
                self._tell(Warned(text=message))
        chosen = torch.tensor(found.step if found else -1, device=next(self.model.parameters()).device)
        step = int(self.workers.gather(chosen)[0])
        if step < 0:
            return
        checkpoint = found or self.checkpoints.load(step)
        self.progress = checkpoint.progress
        self.workload.load_state(self.model, checkpoint.model_state())
        for optimizer, state in zip(self.optimizers, checkpoint.optimizer_states(), strict=True):
            optimizer.load_state_dict(state)
        self._tell(Resumed(step=self.progress.step, total_steps=self.total_steps))
        if self.workers.rank == 0:
            self.writer.tell(self.progress)

    def run(self) -> TrainingResult:
        """Train to the end; returns what it came to (the same on every worker but for timings)."""
        try:
            return self._run()
        finally:
            self.writer.close()  # what is copied is published, if this process lives so long

    def _run(self) -> TrainingResult:
        self._assert_equal_models()
        first_step = self.progress.step
        self._last_save = time.perf_counter()
        self.stopwatch.begin()
        self._tell(
            Started(
                step=first_step,
                total_steps=self.total_steps,
                precision=self.progress.precision,
                workers=self.workers.size,
            )
        )
        while self.progress.step < self.total_steps:
            self._step()
            self.writer.check()
            step = self.progress.step
            if step % self.log_every == 0 or step == self.total_steps:
                self._log()
            if step % self.order.steps_per_epoch == 0:
                self._finish_epoch()
            elif self._checkpoint_is_due():
                self._save()
            was_stopping, self._stopping = self._stopping, self.workers.rank == 0 and self.stop_is_asked()
            if self._stopping and not was_stopping:
                # Asked for because the job is about to be ended from outside; until then it trains on, and where it is not
                # ended after all, it may be asked again.
                self._drain()
                self.writer.wait()
                if step not in self.checkpoints.steps():
                    self._save()
                    self.writer.wait()
                self.stopwatch.begin()
                self._tell(Stopping(step=step))
        self.writer.wait()
        digest = weights_digest(self.workload.state(self.model))
        progress = self.progress
        assert progress.best is not None  # noqa: S101 - every epoch ends with an evaluation
        samples = self.total_steps * self.scale.batch_size
        used = torch.stack(self.workers.gather(self.stopwatch.usage())).cpu()
        return TrainingResult(
            steps=self.total_steps,
            steps_per_epoch=self.order.steps_per_epoch,
            best=progress.best,
            weights_digest=digest,
            order_digest=progress.order_digest,
            loss_digest=progress.loss_digest,
            history=[tuple(row) for row in progress.history],
            trail=[tuple(row) for row in progress.trail],
            precision=progress.precision,
            train_seconds=progress.train_seconds,
            samples=samples,
            samples_per_second=samples / progress.train_seconds,
            usage=Usage(
                cpu_seconds_per_second=float(used[:, 0].sum()),
                peak_memory_bytes=int(used[:, 1].max()),
                peak_gpu_memory_bytes=int(used[:, 2].max()),
                gpu_utilisation=None if used[:, 3].isnan().any() else float(used[:, 3].mean()),
            ),
            parameters=sum(p.numel() for p in self.model.parameters()),
            resumed_from_step=first_step,
        )

    def _assert_equal_models(self) -> None:
        """Raises TrainingFailedError if the workers begin with different models: each would train another one."""
        if self.workers.size == 1:
            return
        whole = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        number = int(weights_digest(whole)[:15], 16)
        numbers = self.workers.gather(torch.tensor(number, device=self.device))
        if any(int(other) != int(numbers[0]) for other in numbers):
            raise TrainingFailedError(
                "the workers have built different models from the same seed. `build_model` and `initialize` must depend on "
                "their arguments alone, and draw random numbers from torch (or the global generators of NumPy and Python), "
                "which are seeded, never from a generator that is not."
            )

    # -- one step -----------------------------------------------------------------------------------------------------
    def _step(self) -> None:
        step = self.progress.step
        epoch, step_in_epoch = divmod(step, self.order.steps_per_epoch)
        rows = self.order.batch(epoch, step_in_epoch)
        factor = self.workload.learning_rate_factor(step / self.total_steps, self.hp)
        for group in self._groups():
            group["lr"] = group["peak_lr"] * factor
        # Around all shards, so that weights are cast once a step and not once a shard.
        with autocast(self.device, self.progress.precision):
            self._undrained.append(self.gradient.compute(rows, self._shard_losses).clone())
        if (limit := self.workload.gradient_clip(self.hp)) is not None:
            # The gradient is the same on every worker by now, and so is its norm.
            nn.utils.clip_grad_norm_(self.gradient.parameters, limit, foreach=False)
        for optimizer in self.optimizers:
            optimizer.step()
        self.progress.order_digest = _chained(self.progress.order_digest, rows.numpy().tobytes())
        self.progress.step += 1

    def _shard_losses(self, shard: int, rows: Tensor) -> Iterator[tuple[Tensor, Tensor | float]]:
        # Augmentation and dropout draw from generators that only the position determines.
        seed_random_numbers(mixed_seed(self.progress.seed, "shard", self.progress.step, shard))
        hp = self.workload.stage(self.progress.step / self.total_steps, self.hp)
        for part in self.workload.micro_batches(self.train_columns, rows, hp):
            with autocast(self.device, "fp32"):
                batch = self.workload.batch(self.train_columns, part, hp, augment=True)
            loss, weight = self.workload.loss(self.model, batch, hp), self.workload.weight(batch, hp)
            if loss.ndim:
                raise TrainingFailedError(
                    f"`loss` is of shape {tuple(loss.shape)}; it must be the sum over the batch's samples, a scalar"
                )
            yield loss, len(part) if weight is None else weight

    # -- bookkeeping --------------------------------------------------------------------------------------------------
    def _drain(self) -> None:
        """Move losses from the device into the progress; waits for the device, so the clock is right afterwards."""
        if self._undrained:
            losses, weights = torch.stack(self._undrained).cpu().unbind(1)
            self._undrained.clear()
            first = self.progress.step - len(losses) + 1
            for number, (loss, weight) in enumerate(zip(losses.tolist(), weights.tolist(), strict=True), start=first):
                if weight == 0:
                    raise TrainingFailedError(
                        f"nothing counts in the batch of step {number} of {self.total_steps}: its samples' weights sum to "
                        "0, so it has no mean loss. Use a larger batch size, or masks that always leave something."
                    )
                if not math.isfinite(loss):
                    raise TrainingFailedError(
                        f"the loss became {loss} at step {number} of {self.total_steps}. Lower the learning rate or set "
                        "`precision: fp32`, and look at the loss curve in MLflow."
                    )
                self.progress.interval_losses.append(loss)
                self.progress.epoch_loss += loss
            self.progress.loss_digest = _chained_each(self.progress.loss_digest, losses)
        self.progress.train_seconds += self.stopwatch.lap()

    def _log(self) -> None:
        self._drain()
        progress = self.progress
        loss = sum(progress.interval_losses) / len(progress.interval_losses)
        progress.interval_losses.clear()
        progress.trail.append([progress.step, *(d[:_SHORT] for d in (progress.order_digest, progress.loss_digest))])
        self._record({"train/loss": loss, "train/learning_rate": self._groups()[0]["lr"]})
        now = time.perf_counter()
        if now - self._last_message >= 0.5 or progress.step == self.total_steps:
            self._last_message = now
            speed = progress.step * self.scale.batch_size / max(progress.train_seconds, 1e-9)
            self._tell(
                Progressed(
                    step=progress.step,
                    total_steps=self.total_steps,
                    epoch=progress.step / self.order.steps_per_epoch,
                    loss=loss,
                    samples_per_second=speed,
                    eta_seconds=(self.total_steps - progress.step) * self.scale.batch_size / speed,
                )
            )

    def _finish_epoch(self) -> None:
        self._drain()
        progress = self.progress
        epoch = progress.step // self.order.steps_per_epoch
        predictions = predictions_of(
            self.workload, self.model, self.validation, self.hp, self.workers, progress.precision
        )
        metrics = self._validated(self.workload.validate(predictions, self.validation_columns), epoch)
        self._record(
            {f"validation/{name}": value for name, value in metrics.items()}
            | {"train/epoch_loss": progress.epoch_loss / self.order.steps_per_epoch, "train/epoch": float(epoch)}
        )
        progress.epoch_loss = 0.0
        if progress.best is None or self.workload.selection_key(metrics) > self.workload.selection_key(
            progress.best.metrics
        ):
            progress.best = Best(step=progress.step, epoch=epoch, metrics=metrics)
        self._tell(EpochEnded(epoch=epoch, epochs=self.scale.epochs, step=progress.step, metrics=metrics))
        self._save()

    def _validated(self, metrics: Mapping[str, float], epoch: int) -> dict[str, float]:
        """Validation metrics as plain numbers. Raises TrainingFailedError if one is missing, or is not finite."""
        metric = self.workload.metric.name
        if missing := [name for name in (metric, "loss") if name not in metrics]:
            raise TrainingFailedError(
                f"`validate` gives {', '.join(metrics) or 'nothing'}, but no {missing[0]!r}; it must give `loss` and the "
                f"workload's metric, {metric!r}"
            )
        numbers = {name: float(value) for name, value in metrics.items()}
        if wrong := [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]:
            # It compares with nothing, so it would decide without a word which checkpoint is the best.
            raise TrainingFailedError(
                f"after epoch {epoch}, the validation metric {wrong[0]}. Either the model's predictions are not finite, or "
                "the figure is not defined for this validation split (one with a single class, say): have `validate` give "
                "a number then, or leave it out."
            )
        return numbers

    def _checkpoint_is_due(self) -> bool:
        policy, writer = self.policy, self.writer
        by_steps = policy.every_steps is not None and self.progress.step % policy.every_steps == 0
        elapsed = time.perf_counter() - self._last_save
        return by_steps or elapsed >= seconds_between(policy, writer.cost_seconds, writer.write_seconds)

    def _save(self) -> None:
        # Only rank 0 decides and writes: all workers hold the same state, so nobody needs to be asked.
        if self.workers.rank == 0:
            self._drain()
            self.writer.save(self.workload.state(self.model), self.optimizers, self.progress)
        self._last_save = time.perf_counter()
        self.stopwatch.begin()

    def _record(self, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self.progress.history += [[name, value, self.progress.step, now] for name, value in metrics.items()]

    def _tell(self, message: Message) -> None:
        if self.workers.rank == 0:
            self.notify(message)

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]


def _chained(digest: str, data: bytes) -> str:
    return hashlib.sha256(digest.encode() + data).hexdigest()


def _chained_each(digest: str, values: Tensor) -> str:
    for value in values.numpy():
        digest = _chained(digest, value.tobytes())
    return digest
