"""What a server counts of itself, in Prometheus' format."""

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
    """Counters, gauges and histograms of one server, in a registry of their own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

        def made(kind: Any, name: str, about: str, labels: tuple[str, ...] = (), **more: Any):
            return kind(f"vlm_{name}", about, labels, registry=self.registry, **more)

        self.requests = made(Counter, "requests", "Requests answered.", ("path", "status"))
        self.latency = made(
            Histogram, "request_seconds", "Seconds to an answer.", ("path",), buckets=SECONDS
        )
        self.refused = made(Counter, "refused", "Requests and items refused, by why.", ("code",))
        self.waiting = made(Gauge, "waiting_items", "Items inside that have no answer yet.")
        self.waiting_bytes = made(Gauge, "waiting_bytes", "Bytes of bodies that are held.")
        self.depth = made(
            Gauge, "queue_depth", "Items decoded that wait for the device.", ("tower", "length")
        )
        sizes = [1 << i for i in range(11)]
        self.batch_items = made(
            Histogram, "batch_items", "Items of a batch.", ("tower",), buckets=sizes
        )
        self.batch_seconds = made(
            Histogram, "batch_seconds", "Seconds of a batch.", ("tower",), buckets=SECONDS
        )

    def batch(self, kind: Any, count: int, seconds: float) -> None:
        """Note a batch that was computed; see `Batcher`."""
        self.batch_items.labels(kind.tower).observe(count)
        self.batch_seconds.labels(kind.tower).observe(seconds)

    def answer(self, path: str, status: int, seconds: float) -> None:
        """Note a request that was answered; `path` is that of a route, not of the client."""
        self.requests.labels(path, str(status)).inc()
        self.latency.labels(path).observe(seconds)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
