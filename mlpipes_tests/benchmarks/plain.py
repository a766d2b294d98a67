"""The plain loop: what the engine computes of the same batches, by the loop that everyone writes, with nothing exact."""

from collections.abc import Iterator

import torch

from mlpipes.training.loop import Trainer


def plain_steps(trainer: Trainer) -> Iterator[None]:
    """Training steps of one worker, endlessly: no shards, no position-dependent random numbers, no digests, no lease."""
    workload, hp, size = trainer.workload, trainer.hp, trainer.scale.batch_size
    rounded = trainer.progress.precision == "bf16"
    stage = getattr(workload, "stage", lambda _, same: same)  # not every commit that is measured has stages
    clip, order, epoch = workload.gradient_clip(hp), trainer.order, 0
    while True:
        for number in range(order.steps_per_epoch):
            rows = order.batch(epoch, number)
            batch = workload.batch(trainer.train_columns, rows, stage(0.0, hp), augment=True)
            for optimizer in trainer.optimizers:
                optimizer.zero_grad()
            with torch.autocast(trainer.device.type, torch.bfloat16, enabled=rounded):
                loss = workload.loss(trainer.model, batch, hp) / size
            loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(trainer.gradient.parameters, clip)
            for optimizer in trainer.optimizers:
                optimizer.step()
            yield
        epoch += 1
