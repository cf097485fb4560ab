"""Prometheus metrics of a pool. Labels are names of upstreams and words of fixed lists."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..http.metrics import LATENCY, PREFIX, REASONS
from .upstream import Upstream

ENDS = ("stop", "error", "refused", "disconnect")


class RouteMetrics:
    """One registry per router."""

    def __init__(self, upstreams: Iterable[Upstream]) -> None:
        self.registry, self._upstreams = CollectorRegistry(), list(upstreams)
        own = self.registry
        self._ends = Counter(PREFIX + "pool_requests", "Requests, by how they ended.", ["end"], registry=own)
        self._answers = Counter(PREFIX + "pool_answers", "Answers that began, by upstream.", ["upstream"], registry=own)
        self._failures = Counter(
            PREFIX + "pool_upstream_failures", "Tries without an answer, or with part of one.", ["upstream"], registry=own
        )
        self._refused = Counter(PREFIX + "requests_refused", "Requests refused at the door, by reason.", ["reason"], registry=own)
        self._up = Gauge(PREFIX + "pool_upstream_up", "Whether an upstream lists its models.", ["upstream"], registry=own)
        self._running = Gauge(PREFIX + "pool_requests_running", "Requests that an upstream has now.", ["upstream"], registry=own)
        text = "From a request to the first bytes of its upstream's answer."
        self._first = Histogram(PREFIX + "pool_first_byte_seconds", text, ["upstream"], buckets=LATENCY, registry=own)
        for end in ENDS:
            self._ends.labels(end=end)
        for reason in REASONS:
            self._refused.labels(reason=reason)
        for upstream in self._upstreams:
            for made in (self._answers, self._failures, self._first):
                made.labels(upstream=upstream.form.name)

    def refuse(self, reason: str) -> None:
        self._refused.labels(reason=reason).inc()

    def end(self, how: str) -> None:
        self._ends.labels(end=how).inc()

    def answer(self, upstream: str, seconds: float) -> None:
        self._answers.labels(upstream=upstream).inc()
        self._first.labels(upstream=upstream).observe(seconds)

    def fail(self, upstream: str) -> None:
        self._failures.labels(upstream=upstream).inc()

    def text(self) -> bytes:
        """In Prometheus' form, with what is so now."""
        for upstream in self._upstreams:
            self._up.labels(upstream=upstream.form.name).set(upstream.up)
            self._running.labels(upstream=upstream.form.name).set(upstream.running)
        return generate_latest(self.registry)
