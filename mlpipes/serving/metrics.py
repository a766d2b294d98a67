"""What Prometheus reads of a server: requests, batches, the version that answers, and what it answers."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mlpipes.serving.model import ServedModel
from mlpipes.serving.summaries import classes_in
from mlpipes.workloads.golden import Values

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
_DIFFERENCES = (0, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1, 10, 100)
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
        self.answered_by = Counter(
            "mlpipes_serve_version_requests", "Requests answered, by version", ["version"], registry=registry
        )
        self.share = Gauge("mlpipes_serve_canary_share", "Share of clients that the canary answers", registry=registry)
        self.rollbacks = Counter(
            "mlpipes_serve_rollbacks", "Canaries that failed, and answer nobody since", ["version"], registry=registry
        )
        self.shadowed = Counter(
            "mlpipes_serve_shadow_samples",
            "Samples that both versions gave a class",
            ["canary", "agree"],
            registry=registry,
        )
        self.difference = Histogram(
            "mlpipes_serve_shadow_difference",
            "Greatest absolute difference between both versions' answers to a sample",
            buckets=_DIFFERENCES,
            registry=registry,
        )
        self.shadow_failed = Counter(
            "mlpipes_serve_shadow_failed",
            "Requests that the other version could not answer",
            ["version"],
            registry=registry,
        )
        self.shadow_dropped = Counter(
            "mlpipes_serve_shadow_dropped", "Requests not compared, for there was no time", registry=registry
        )
        self.sample_dropped = Counter(
            "mlpipes_serve_sample_dropped", "Requests not sampled, or samples not written", registry=registry
        )

    def swapped(self, model: ServedModel) -> None:
        """Another version answers."""
        self.swaps.inc()
        self.version.clear()
        self.version.labels(model.name, model.scale, str(model.exact).lower()).set(int(model.version))

    def answered(self, model: ServedModel, answer: Values) -> None:
        """Count classes and confidences, where answers are such."""
        self.answered_by.labels(model.version).inc()
        labels, confidences = classes_in(model, answer)
        if max(len(model.about.get("class_names") or ()), len(set(labels))) <= _MOST_CLASSES:
            for label in labels:
                self.answers.labels(label).inc()
        for confidence in confidences:
            self.confidence.observe(confidence)

    def page(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)
