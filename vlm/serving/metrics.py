"""Prometheus metrics of the server."""

from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters, gauges and histograms of one server, in their own registry."""

    def __init__(self):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

        own: Any = {"namespace": "vlm", "registry": self.registry}
        timed = own | {"buckets": SECONDS}
        counted = own | {"buckets": [1 << i for i in range(11)]}
        self.requests = Counter("requests", "Requests answered.", ("path", "status"), **own)
        self.latency = Histogram(
            "request_seconds", "Request latency in seconds.", ("path",), **timed
        )
        self.refused = Counter(
            "refused", "Rejected requests and items, by error code.", ("code",), **own
        )
        self.waiting = Gauge("waiting_items", "Items in flight.", **own)
        self.waiting_bytes = Gauge("waiting_bytes", "Bytes of request bodies in memory.", **own)
        self.depth = Gauge(
            "queue_depth", "Decoded items waiting for the device.", ("tower", "length"), **own
        )
        self.reloads = Counter(
            "index_reloads", "Reloads of the index, by result.", ("result",), **own
        )
        self.batch_items = Histogram("batch_items", "Items per batch.", ("tower",), **counted)
        self.batch_seconds = Histogram(
            "batch_seconds", "Compute time of a batch in seconds.", ("tower",), **timed
        )

    def batch(self, kind: Any, count: int, seconds: float) -> None:
        """Record a computed batch; see `Batcher`."""
        self.batch_items.labels(kind.tower).observe(count)
        self.batch_seconds.labels(kind.tower).observe(seconds)

    def answer(self, path: str, status: int, seconds: float) -> None:
        """Record an answered request; `path` is the route's pattern, not the URL of the client."""
        self.requests.labels(path, str(status)).inc()
        self.latency.labels(path).observe(seconds)

    def text(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self.registry)
