"""The workload `digits` behind barriers: the project's own in everything but that it waits where a test says so."""

from dataclasses import replace

from mlpipes.store.layout import home
from mlpipes.training.dry_run import LATEST
from mlpipes.workloads import image_classification
from mlpipes.workloads.image_classification import ImageClassification, ImageHyperparameters
from mlpipes_tests.barriers import Barriers, haste


class Held(ImageClassification):
    """Waits at closed barriers before a step. All workers wait, and none is in a collective operation meanwhile."""

    def learning_rate_factor(self, progress: float, hp: ImageHyperparameters) -> float:
        """The usual factor; asked for once a step, with the step's place, which is what a barrier needs to know."""
        if progress != LATEST:  # no step, but the dry run asks for the factor of the last one
            Barriers(home()).hold(progress)
        return super().learning_rate_factor(progress, hp)


_original = image_classification.digits
_FULL, _LEAST = 1258, 128
"""Training samples of digits, and of a single batch."""
_split = _original.split if haste() == 1 else replace(_original.split, train_cap=max(_LEAST, _FULL // haste()))
digits = Held(_original.source, _split, _original.hyperparameters)
REFERENCE = "mlpipes.workloads.image_classification:digits" if haste() == 1 else "mlpipes_tests.held:digits"
"""What an uninterrupted training runs that a held one is compared with: the project's own, unless that is too slow."""
