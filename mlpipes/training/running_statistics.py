"""Running statistics of normalisation layers: the one state of a model that a forward pass may change.

Batch normalisation sees one logical shard at a time ("ghost batches", Hoffer et al. 2017, arXiv:1705.08741); its running
statistics are averaged over shards, so that they too are the same whoever computed the shards.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from mlpipes.errors import TrainingFailedError

NORMALIZATIONS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


class RunningStatistics:
    """The running statistics of a model, which each shard moves on from where the step began."""

    def __init__(self, model: nn.Module) -> None:
        layers = [layer for layer in model.modules() if isinstance(layer, NORMALIZATIONS)]
        buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
        self.averaged = [buffer for buffer in buffers if buffer.is_floating_point()]
        self._all, known = buffers, {id(buffer) for buffer in buffers}
        self._others = {name: buffer for name, buffer in model.named_buffers() if id(buffer) not in known}
        self._before: Sequence[Tensor] = ()
        self._unchecked = True

    def begin(self) -> None:
        """A step begins: keep the statistics as they are."""
        self._before = [buffer.clone() for buffer in self._all]
        if self._unchecked:
            self._others_before = {name: buffer.clone() for name, buffer in self._others.items()}

    def restore(self) -> None:
        """The statistics as they were when the step began."""
        for buffer, old in zip(self._all, self._before, strict=True):
            buffer.copy_(old)

    def end(self, sums: Sequence[Tensor], shards: int) -> None:
        """A step ends: take the mean of so many shards from their sums.

        Raises TrainingFailedError after the first step if a shard has changed any other buffer: workers compute different
        shards, so they would no longer hold equal models.
        """
        for buffer, total in zip(self.averaged, sums, strict=True):
            buffer.copy_(total / shards)
        if self._unchecked:
            self._unchecked = False
            for name, old in self._others_before.items():
                if not old.equal(self._others[name]):
                    raise TrainingFailedError(
                        f"the forward pass changes the buffer {name!r}. Only the running statistics of torch's batch and "
                        "instance normalisation may change there, because they can be averaged over the parts of a batch. "
                        "Change it after the optimizer's step instead, or use a layer without such a state."
                    )
            self._others_before = {}
