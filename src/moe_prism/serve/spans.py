"""OpenTelemetry spans of requests: one for each, and below it one for every stage of every sequence. Off unless somebody asks.

A span is made when its request has ended, from times that were noted on the way. So tracing costs nothing while tokens are computed, and
a collector that does not answer delays nobody: a thread of the library sends what it can and drops the rest.

Names of attributes are those of OpenTelemetry's conventions for generative AI where they have one (`gen_ai...`), else ours
(`moe_prism...`). No span holds text of a prompt or an answer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError

ASKED = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""Variables that say where spans go, and so that there shall be some."""
LAST_MS = 2000
"""Milliseconds for the last spans when the server ends."""


@dataclass(frozen=True)
class Stages:
    """One sequence of an answer, in seconds of the engine's clock; None: it did not come to that.

    arrived; begun: its first step began; first, last: its first and its last token.
    """

    arrived: float
    begun: float | None
    first: float | None
    last: float | None

    def until(self, end: float) -> Iterator[tuple[str, float, float]]:
        """(name, start, end) of what it went through until the request's end."""
        begun = self.begun if self.begun is not None else self.first if self.first is not None else end
        yield "queue", self.arrived, begun
        if self.begun is not None:
            yield "prefill", begun, self.first if self.first is not None else end
        if self.first is not None:
            yield "decode", self.first, self.last if self.last is not None else self.first


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A request that has ended. name: of its span; start, end: on the engine's clock; attributes: plain values, None ones are left out."""

    name: str
    traceparent: str | None
    start: float
    end: float
    sequences: tuple[Stages, ...]
    attributes: Mapping[str, Any]
    failed: bool


class SpanWriter:
    """Writes spans through a provider of `opentelemetry.sdk`."""

    def __init__(self, provider: Any, clock: Callable[[], float]) -> None:
        """clock: the engine's."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._clock = provider, clock
        self._tracer = provider.get_tracer("moe_prism")
        self._context = TraceContextTextMapPropagator()

    def write(self, ended: Ended) -> None:
        """The span of a request, below its client's where it named one, and those of its stages."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        zero = time.time_ns() - round(1e9 * self._clock())

        def at(seconds: float) -> int:
            return zero + round(1e9 * seconds)

        told = {"traceparent": ended.traceparent} if ended.traceparent else {}
        span = self._tracer.start_span(
            ended.name,
            context=self._context.extract(told),
            kind=SpanKind.SERVER,
            start_time=at(ended.start),
            attributes={name: value for name, value in ended.attributes.items() if value is not None},
        )
        below = set_span_in_context(span)
        for number, sequence in enumerate(ended.sequences):
            for name, start, stop in sequence.until(ended.end):
                own = {"moe_prism.sequence": number}
                stage = self._tracer.start_span(name, context=below, start_time=at(start), attributes=own)
                stage.end(at(max(start, stop)))
        if ended.failed:
            span.set_status(Status(StatusCode.ERROR))
        span.end(at(ended.end))

    def close(self) -> None:
        """Send what is left, within `LAST_MS`."""
        self._provider.force_flush(LAST_MS)
        self._provider.shutdown()


def is_asked(endpoint: str | None, environment: Mapping[str, str]) -> bool:
    """Whether there shall be spans. UsageError for what the variables ask of us that we have not."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        if endpoint:
            raise UsageError("--otlp-traces-endpoint, and OTEL_SDK_DISABLED is true", "leave one of them out")
        return False
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip()
    wanted = bool(endpoint) or exporter == "otlp" or any(environment.get(name) for name in ASKED)
    if exporter == "none" and not endpoint:
        return False
    if wanted or exporter:
        protocol = environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environment.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        for name, value, legal in (
            ("OTEL_TRACES_EXPORTER", exporter, ("", "otlp", "none")),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol or "", ("", "http/protobuf")),
        ):
            if value not in legal:
                raise UsageError(f"{name} is '{value[:40]}'", f"spans go out as {legal[1]} only: say that, or leave it out")
    return wanted


def need_spans(endpoint: str | None) -> None:
    """UsageError where spans are asked for and their library is missing."""
    if not is_asked(endpoint, os.environ):
        return
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        raise UsageError(f"spans need {error.name}", "pip install 'moe-prism[otel]'") from error


def spans_of(endpoint: str | None, clock: Callable[[], float]) -> SpanWriter | None:
    """What the option and the environment ask for; None: nothing."""
    if not is_asked(endpoint, os.environ):
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = TracerProvider(resource=Resource.create({} if named else {"service.name": "moe-prism"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return SpanWriter(provider, clock)
