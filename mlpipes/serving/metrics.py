"""What Prometheus reads of a server: requests, batches, the version that answers, and what it answers."""

from collections.abc import Mapping

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mlpipes.serving.model import ServedModel
from mlpipes.workloads.golden import Values

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
_CONFIDENCES = tuple(edge / 20 for edge in range(1, 21))
_MOST_CLASSES = 100
"""Beyond so many, classes are not counted one by one: each would be a time series."""


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("mlpipes_serve_requests", "Requests", ["route", "code"], registry=registry)
        self.seconds = Histogram("mlpipes_serve_seconds", "Seconds a request", buckets=_SECONDS, registry=registry)
        self.batches = Histogram(
            "mlpipes_serve_batch_rows", "Samples that went through the model together", buckets=_ROWS, registry=registry
        )
        self.in_flight = Gauge("mlpipes_serve_in_flight", "Requests that are being answered", registry=registry)
        self.swaps = Counter("mlpipes_serve_swaps", "Versions that have taken over", registry=registry)
        self.version = Gauge(
            "mlpipes_serve_version", "The version that answers", ["model", "scale", "exact"], registry=registry
        )
        self.answers = Counter("mlpipes_serve_answers", "Answers by class", ["label"], registry=registry)
        self.confidence = Histogram(
            "mlpipes_serve_confidence", "Probability of the class", buckets=_CONFIDENCES, registry=registry
        )

    def swapped(self, model: ServedModel) -> None:
        """Another version answers."""
        self.swaps.inc()
        self.version.clear()
        self.version.labels(model.name, model.scale, str(model.exact).lower()).set(int(model.version))

    def answered(self, model: ServedModel, answer: Values) -> None:
        """Count classes and confidences, where answers are such."""
        labels, confidences = _classes(model, answer)
        if len(set(labels)) <= _MOST_CLASSES:
            for label in labels:
                self.answers.labels(label).inc()
        for confidence in confidences:
            self.confidence.observe(confidence)

    def page(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)


def _classes(model: ServedModel, answer: Values) -> tuple[list[str], list[float]]:
    if isinstance(answer, np.ndarray):
        names = model.about.get("class_names")
        if not names or answer.shape[1:] != (len(names),) or len(names) > _MOST_CLASSES:
            return [], []
        shares = np.exp(answer - answer.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return [str(names[place]) for place in answer.argmax(axis=1)], shares.max(axis=1).tolist()
    if "label" not in answer:
        return [], []
    return [str(label) for label in answer["label"]], _greatest(answer)


def _greatest(answer: Mapping[str, np.ndarray]) -> list[float]:
    shares = [np.asarray(column) for name, column in answer.items() if name.startswith("p(")]
    return np.max(shares, axis=0).tolist() if shares else []
