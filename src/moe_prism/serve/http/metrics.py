"""Prometheus metrics: vLLM's names where the meaning is vLLM's (with our prefix), and ours for what only we have."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ...schedule.base import Ladder
from ..backend import ExpertReads, Gauges, Tally
from .vllm_names import VllmNames

PREFIX = "moe_prism:"
RECENT = 512
"""Latencies per class that the status page takes its percentiles of."""
LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
GAPS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
REASONS = (
    "queue_requests", "queue_tokens", "draining", "unauthorized", "too_large", "slow_body", "slow_reader", "unsupported_media_type",
)  # fmt: skip


READS = {
    "steps": ("store_steps", "Steps that experts on disk served."),
    "tokens": ("store_tokens", "Tokens in them."),
    "requested": ("records_requested", "Records (sub-experts) that layers asked for, each once per layer and step."),
    "missed": ("records_missed", "Of them, those that had to be read."),
    "bytes": ("bytes_read", "Bytes of records read, ahead of their use too."),
    "waited": ("stall_seconds", "Seconds in which a step waited for records."),
}
OF_WINDOW = {
    "hit_rate": ("hit_rate_of_window", "Of the last records asked for, the share that was in memory, 0..1."),
    "bound": ("best_hit_rate_of_window", "The share that the best cache of this size would have had, Belady's rule, 0..1."),
}


class Metrics:
    """One registry per server. Labels take values from fixed lists only, so their number is bounded."""

    def __init__(self, model: str, classes: Iterable[str], ladder: Ladder) -> None:
        self.registry = CollectorRegistry()
        self.theirs = CollectorRegistry()
        self.theirs.register(VllmNames(self.registry, PREFIX))
        self.ladder = ladder
        self._model = {"model_name": model}

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(PREFIX + name, text, ["model_name"], registry=self.registry).labels(**self._model)

        def counter(name: str, text: str, *labels: str) -> Counter:
            made = Counter(PREFIX + name, text, ["model_name", *labels], registry=self.registry)
            return made if labels else made.labels(**self._model)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, ["model_name", "class"], buckets=buckets, registry=self.registry)

        self.running = gauge("num_requests_running", "Sequences in the batch.")
        self.waiting = gauge("num_requests_waiting", "Sequences in the queue.")
        self.cache = gauge("kv_cache_usage_perc", "Used share of the KV cache, 0..1.")
        self.level = gauge("quality_of_last_step", "Mean quality of the tokens of the last step, 0..1.")
        self.slots = gauge("slots_per_token_of_last_step", "Mean kept slots per token and layer of the last step, K.")
        self.prompt = counter("prompt_tokens", "Prompt tokens computed.")
        self.generated = counter("generation_tokens", "Tokens generated.")
        self.cached = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.queried = counter("prefix_cache_queries", "Prompt tokens of admitted requests.")
        self.finished = counter("request_success", "Requests that ended, by reason.", "finished_reason")
        self.refused = counter("requests_refused", "Requests refused at the door, by reason.", "reason")
        self.at_level = counter("operating_point_tokens", "Tokens computed, by operating point.", "point")
        self.switches = counter("operating_point_switches", "Steps whose mean K differs from the step before by a slot or more.")
        self.slo = counter("slo", "Targets met and missed, by class.", "class", "target", "met")
        self.nan = counter("nonfinite_aborts", "Sequences ended because the model returned NaN or infinity.")
        self.failed = counter("failed_steps", "Steps that raised an error.")
        self.drafted = counter("spec_decode_num_draft_tokens", "Tokens that requests drafted for themselves.")
        self.kept = counter("spec_decode_num_accepted_tokens", "Drafted tokens that were right.")
        self.restarts = counter("engine_restarts", "Engines that were started again.")
        self.disconnects = counter("client_disconnects", "Requests whose client left.")
        self._reads: ExpertReads | None = None
        self._of_reads = dict[str, Counter | Gauge]()
        self._made = counter, gauge
        self.ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", LATENCY)
        self.gap = histogram("inter_token_latency_seconds", "Between two tokens of a sequence.", GAPS)
        self.queue = histogram("request_queue_time_seconds", "From arrival to the first step of the request.", LATENCY)
        self.e2e = histogram("e2e_request_latency_seconds", "From arrival to the end.", LATENCY)
        self.step = Histogram(
            PREFIX + "step_seconds", "One step of the engine.", ["model_name"], buckets=GAPS, registry=self.registry
        ).labels(**self._model)
        asked = (1e-5, 3e-5, 1e-4, 2e-4, 4e-4, 1e-3, 3e-3, 1e-2)
        self.asked = Histogram(
            PREFIX + "policy_seconds", "Of it, choosing what to run.", ["model_name"], buckets=asked, registry=self.registry
        ).labels(**self._model)
        self._recent: dict[tuple[str, str], deque[float]] = {}
        self._names = [level.name for level in ladder.levels]
        self._slots = 0.0
        self._failed_steps = self._restarts = self._drafted = self._kept = 0
        for reason in REASONS:
            self.refused.labels(**self._model, reason=reason)
        for name in self._names:
            self.at_level.labels(**self._model, point=name)
        for kind in classes:
            for made in (self.ttft, self.gap, self.queue, self.e2e):
                made.labels(**self._model, **{"class": kind})

    def observe_step(self, step: Tally) -> None:
        """After every step, in the thread of the engine's observer."""
        self.step.observe(step.seconds)
        self.asked.observe(step.asked)
        self.prompt.inc(step.prompt)
        self.generated.inc(step.generated)
        for level, count in step.levels.items():
            self.at_level.labels(**self._model, point=self._names[level]).inc(count)
        quality, slots = self.ladder.mean(step.levels)
        self.level.set(quality)
        self.slots.set(slots)
        if abs(slots - self._slots) >= 1:
            self.switches.inc()
        self._slots = slots

    def set_gauges(self, now: Gauges) -> None:
        """Before they are read."""
        self.running.set(now.running)
        self.waiting.set(now.waiting)
        self.cache.set(now.cache)
        self.failed.inc(max(0, now.failed_steps - self._failed_steps))
        self.restarts.inc(max(0, now.restarts - self._restarts))
        self._failed_steps, self._restarts = now.failed_steps, now.restarts
        self.drafted.inc(max(0, now.drafted - self._drafted))
        self.kept.inc(max(0, now.kept - self._kept))
        self._drafted, self._kept = now.drafted, now.kept

        if now.reads is not None:
            self._set_reads(now.reads)

    def _set_reads(self, now: ExpertReads) -> None:
        """Experts on disk; there are such metrics from the first time on."""
        if self._reads is None:
            counter, gauge = self._made
            self._of_reads = {name: counter(f"expert_{full}", text) for name, (full, text) in READS.items()}
            self._of_reads |= {name: gauge(f"expert_{full}", text) for name, (full, text) in OF_WINDOW.items()}
        before = self._reads or ExpertReads()
        for name in READS:
            own = self._of_reads[name]
            assert isinstance(own, Counter)
            own.inc(max(0, getattr(now, name) - getattr(before, name)))
        for name in OF_WINDOW:
            own, value = self._of_reads[name], getattr(now, name)
            assert isinstance(own, Gauge)
            own.set(math.nan if value is None else value)
        self._reads = now

    @property
    def reads(self) -> ExpertReads | None:
        """As `set_gauges` was told last."""
        return self._reads

    def refuse(self, reason: str) -> None:
        self.refused.labels(**self._model, reason=reason).inc()

    def finish(self, reason: str) -> None:
        self.finished.labels(**self._model, finished_reason=reason).inc()

    def latency(self, histogram: Histogram, kind: str, seconds: float) -> None:
        histogram.labels(**self._model, **{"class": kind}).observe(max(0.0, seconds))

    def remember(self, what: str, kind: str, seconds: float) -> None:
        """A latency of a request of a class, for `percentiles`."""
        self._recent.setdefault((what, kind), deque(maxlen=RECENT)).append(max(0.0, seconds))

    def percentiles(self, what: str, kind: str) -> dict[str, float] | None:
        """Milliseconds that half, and 95 %, of the last requests of a class did not pass; None where there is none yet."""
        found = sorted(self._recent.get((what, kind), ()))
        if not found:
            return None
        last = len(found) - 1
        return {"p50": round(1e3 * found[last // 2], 3), "p95": round(1e3 * found[-(-last * 95 // 100)], 3)}

    def target(self, kind: str, target: str, met: bool) -> None:
        self.slo.labels(**self._model, **{"class": kind}, target=target, met="true" if met else "false").inc()

    def text(self) -> bytes:
        return generate_latest(self.registry) + generate_latest(self.theirs)
