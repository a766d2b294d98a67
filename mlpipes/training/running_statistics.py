"""Running statistics of normalisation layers: the one state of a model that a forward pass may change.

Batch normalisation sees one logical shard at a time ("ghost batches", Hoffer et al. 2017, arXiv:1705.08741); its running
statistics are averaged over shards, so that they too are the same whoever computed the shards.
"""

from collections.abc import Iterator, Sequence

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
        self._all, known = buffers, {id(layer) for layer in layers}
        self._others = [(name, module) for name, module in model.named_modules() if id(module) not in known]
        self._others = [(name, module) for name, module in self._others if module._buffers]
        self._before: Sequence[Tensor] = ()
        self._seen: dict[str, tuple[Tensor, int, Tensor | None]] = {}
        self._touched: set[str] | None = None
        """Other buffers that a forward pass writes to, or replaces, with equal ones; None before the first step is over."""

    def begin(self) -> None:
        """A step begins: keep the statistics as they are."""
        self._before = [buffer.clone() for buffer in self._all]
        # torch counts the writes to a tensor: what is not touched needs no copy.
        self._seen = {
            name: (buffer, buffer._version, buffer.clone() if self._touched is None or name in self._touched else None)
            for name, buffer in self._other_buffers()
        }

    def restore(self) -> None:
        """The statistics as they were when the step began."""
        for buffer, old in zip(self._all, self._before, strict=True):
            buffer.copy_(old)

    def end(self, sums: Sequence[Tensor], shards: int) -> None:
        """A step ends: take the mean of so many shards from their sums.

        Raises TrainingFailedError if a shard has changed any other buffer, in place or by another one: workers compute
        different shards, so they would no longer hold equal models.
        """
        for buffer, total in zip(self.averaged, sums, strict=True):
            buffer.copy_(total / shards)
        touched = set(self._touched or ())
        for name, buffer in self._other_buffers():
            old, writes, content = self._seen.get(name, (None, 0, None))
            if buffer is old and buffer._version == writes:
                continue
            if old is not None and (content is None or not content.equal(buffer)):  # None: made now, such as a cache
                raise TrainingFailedError(
                    f"the forward pass changes the buffer {name!r}. Only the running statistics of torch's batch and "
                    "instance normalisation may change there, because they can be averaged over the parts of a batch. "
                    "Change it after the optimizer's step instead, or use a layer without such a state."
                )
            touched.add(name)
        self._touched, self._seen = touched, {}

    def _other_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """By name, as they are now: a module may replace its buffer by another tensor."""
        for prefix, module in self._others:
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    yield f"{prefix}.{name}" if prefix else name, buffer
