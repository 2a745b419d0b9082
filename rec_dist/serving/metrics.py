"""The numbers of a server for Prometheus, at /metrics. docs/serving.md lists them."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from rec_dist.models.prompt_cache import PromptCounts

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_PREFIX = "rec_dist_serve_"


class Metrics:
    """All numbers of one server, with those of its process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(f"{_PREFIX}requests", "Requests answered", ("route", "status"), registry=registry)
        self.seconds = Histogram(
            f"{_PREFIX}request_seconds", "From a request to its answer", ("route",), buckets=_SECONDS, registry=registry
        )
        self.unanswered = Gauge(f"{_PREFIX}unanswered_requests", "Requests that wait or are being scored", registry=registry)
        self.batch_requests = Histogram(
            f"{_PREFIX}batch_requests", "Requests scored together", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.batch_seconds = Histogram(f"{_PREFIX}batch_seconds", "Scoring of a batch", buckets=_SECONDS, registry=registry)
        self.scores = Counter(f"{_PREFIX}scores", "Scores computed", registry=registry)
        self.prompts = Counter(
            f"{_PREFIX}prompts", "Prompts of language models, by what was kept of them", ("outcome",), registry=registry
        )
        self.evictions = Counter(f"{_PREFIX}prompt_evictions", "Kept prompts that made room for others", registry=registry)
        self.retries = Counter(f"{_PREFIX}retries", "Batches given to another scorer after one was lost", registry=registry)
        self.models = Counter(f"{_PREFIX}models", "Models taken up, or not", ("outcome",), registry=registry)

    def count_prompts(self, counts: PromptCounts) -> None:
        """Adds what a scorer has counted."""
        for outcome, number in (("hit", counts.hits), ("extension", counts.extensions), ("miss", counts.misses)):
            self.prompts.labels(outcome).inc(number)
        self.evictions.inc(counts.evictions)

    def text(self) -> bytes:
        """The numbers in Prometheus's text format."""
        return generate_latest(self.registry)
