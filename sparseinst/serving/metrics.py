"""Metrics of the service in Prometheus' format."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest


class Metrics:
    """Counters of one service.

    Args:
        num_running: returns the requests that are waiting or predicted.
        is_ready: returns whether the model is loaded.

    Attributes:
        requests: answered requests, by endpoint and status; 499: the client left before.
        seconds: from decoding an image to its answer, without waiting.
        instances: instances that were returned.
    """

    def __init__(self, num_running: Callable[[], int], is_ready: Callable[[], bool]) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "sparseinst_requests", "Answered requests; 499: the client left", ["endpoint", "status"], registry=registry
        )
        self.seconds = Histogram(
            "sparseinst_prediction_seconds", "Time from decoding an image to its answer", registry=registry
        )
        self.instances = Counter("sparseinst_instances", "Instances that were returned", registry=registry)
        running = Gauge("sparseinst_running_requests", "Requests that wait or are predicted", registry=registry)
        running.set_function(num_running)
        ready = Gauge("sparseinst_model_ready", "1 where the model is loaded", registry=registry)
        ready.set_function(is_ready)

    def text(self) -> bytes:
        """Return all metrics."""
        return generate_latest(self._registry)
