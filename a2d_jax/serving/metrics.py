"""What `/metrics` counts."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "a2d_requests",
            "chat requests by how they ended: stop, length, content_filter, cancelled, timeout, busy, shutdown, error, "
            "invalid",
            ["outcome"],
            registry=self.registry,
        )
        self.responses = Counter(
            "a2d_http_responses", "answers to chats by status", ["path", "status"], registry=self.registry
        )
        self.waiting = Gauge("a2d_requests_waiting", "requests in the queue", registry=self.registry)
        self.running = Gauge("a2d_requests_running", "requests that are being decoded", registry=self.registry)
        self.tokens = Counter("a2d_tokens", "tokens of prompts and of answers", ["kind"], registry=self.registry)
        self.passes = Counter("a2d_forward_passes", "passes that requests took part in", registry=self.registry)
        self.seconds = Histogram(
            "a2d_request_seconds", "from arrival to the end", registry=self.registry, buckets=_SECONDS
        )
        self.first_text_seconds = Histogram(
            "a2d_first_text_seconds", "from arrival to the first text", registry=self.registry, buckets=_SECONDS
        )
        self.batch_rows = Histogram(
            "a2d_batch_requests", "requests per turn", registry=self.registry, buckets=(1, 2, 4, 8, 16, 32, 64)
        )
