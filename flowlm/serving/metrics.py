"""What /metrics says, in the words of Prometheus."""

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The figures of one server.

    Attributes:
      requests: by the status of their answer.
      latency: from a request to the end of its answer, by model and number of steps.
      waiting: rows that wait for the devices.
      batch: rows of a batch.
      rows: that were written.
      devices: seconds in which rows were written.
      compiling: seconds in which programs were compiled.
    """

    def __init__(self) -> None:
        prometheus_client.disable_created_metrics()  # a second series of each, of when it began
        self.registry = CollectorRegistry()
        more = {"registry": self.registry, "namespace": "flowlm"}
        self.requests = Counter("requests", "answers by their status", ["status"], **more)
        self.latency = Histogram(
            "request_seconds", "from a request to the end of its answer", ["model", "steps"], buckets=SECONDS, **more
        )
        self.waiting = Gauge("rows_waiting", "rows that wait for the devices", **more)
        self.batch = Histogram("batch_rows", "rows that were written together", ["model"], buckets=ROWS, **more)
        self.rows = Counter("rows", "rows that were written", ["model"], **more)
        self.devices = Counter("device_seconds", "in which rows were written", ["model"], **more)
        self.compiling = Counter("compile_seconds", "in which programs were compiled", ["model"], **more)

    def observe(self, model: str, steps: int, seconds: float) -> None:
        """A request that was answered. Numbers of steps are rounded up to a power of two, so that there are few series."""
        self.latency.labels(model, str(1 << (steps - 1).bit_length())).observe(seconds)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)
