"""The workload `digits` behind barriers: the project's own in everything but that it waits where a test says so."""

from mlpipes.store.layout import home
from mlpipes.workloads import image_classification
from mlpipes.workloads.image_classification import ImageClassification, ImageHyperparameters
from mlpipes_tests.barriers import Barriers


class Held(ImageClassification):
    """Waits at closed barriers before a step. All workers wait, and none is in a collective operation meanwhile."""

    def learning_rate_factor(self, progress: float, hp: ImageHyperparameters) -> float:
        """The usual factor; asked for once a step, with the step's place, which is what a barrier needs to know."""
        Barriers(home()).hold(progress)
        return super().learning_rate_factor(progress, hp)


_original = image_classification.digits
digits = Held(_original.source, _original.split, _original.hyperparameters)
