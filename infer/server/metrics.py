"""The server's metrics in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from infer.engine.config import EngineStats

_COUNTERS = {
    "prompt_tokens": "Tokens of prompts",
    "cached_prompt_tokens": "Tokens of prompts that the prefix cache held",
    "generated_tokens": "Tokens generated",
    "drafted_tokens": "Tokens drafted for speculation",
    "accepted_tokens": "Drafted tokens that the model accepted",
    "image_tokens": "Tokens of images",
    "image_cache_hits": "Images whose features were cached",
    "image_cache_misses": "Images that the tower encoded",
    "preemptions": "Running requests preempted for lack of pages",
    "decode_steps": "Decode steps",
    "prefill_passes": "Prefill passes",
}
_GAUGES = {
    "running": "Requests being decoded",
    "waiting": "Requests waiting in the engine",
    "pages_used": "Cache pages in use",
    "pages_total": "Cache pages",
}
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class _EngineCollector:
    """Reads the engine's stats at every scrape."""

    def __init__(self, stats: EngineStats, active: Callable[[], int]):
        self.stats, self.active = stats, active

    def collect(self) -> Iterator[Metric]:
        for name, documentation in _COUNTERS.items():
            yield CounterMetricFamily(f"phi4rv_{name}", documentation, value=getattr(self.stats, name))
        for name, documentation in _GAUGES.items():
            yield GaugeMetricFamily(f"phi4rv_{name}", documentation, value=getattr(self.stats, name))
        yield GaugeMetricFamily("phi4rv_active_requests", "Admitted and not ended", value=self.active())
        finished = CounterMetricFamily("phi4rv_finished", "Requests that ended, by reason", labels=["reason"])
        for reason, count in dict(self.stats.finished).items():
            finished.add_metric([reason], count)
        yield finished


class Metrics:
    """``active``: the number of admitted requests. A registry of its own: several servers may share a process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, stats: EngineStats, active: Callable[[], int]):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(stats, active))
        self.first_token = Histogram(
            "phi4rv_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.between_tokens = Histogram(
            "phi4rv_time_between_tokens_seconds",
            "From one delivery of tokens to the next, by its tokens",
            buckets=(0.001, 0.0025, *_BUCKETS[:10]),
            registry=self.registry,
        )
        self.responses = Counter("phi4rv_http_responses", "HTTP responses", ["route", "status"], registry=self.registry)

    def render(self) -> bytes:
        return generate_latest(self.registry)
