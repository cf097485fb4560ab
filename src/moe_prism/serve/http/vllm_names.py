"""The same figures under vLLM's names, for routers and autoscalers that know these: `vllm:num_requests_waiting` and its kin."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

THEIRS = "vllm:"
NAMES = frozenset(
    {
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prompt_tokens",
        "generation_tokens",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "request_success",
        "spec_decode_num_draft_tokens",
        "spec_decode_num_accepted_tokens",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_queue_time_seconds",
        "e2e_request_latency_seconds",
    }
)
"""What means the same here and there. vLLM's `engine` label is always 0: one server is one engine."""


class VllmNames(Collector):
    """Reads another registry; nothing is counted twice."""

    def __init__(self, ours: CollectorRegistry, prefix: str) -> None:
        self.ours, self.prefix = ours, prefix

    def describe(self) -> list[Metric]:
        """Nothing is collected before somebody asks."""
        return []

    def collect(self) -> Iterator[Metric]:
        for metric in self.ours.collect():
            name = metric.name.removeprefix(self.prefix)
            if name not in NAMES:
                continue
            twin = Metric(THEIRS + name, metric.documentation, metric.type)
            for sample in metric.samples:
                labels = {**sample.labels, "engine": "0"}
                twin.samples.append(Sample(THEIRS + sample.name.removeprefix(self.prefix), labels, sample.value))
            yield twin
