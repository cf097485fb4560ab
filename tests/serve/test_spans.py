"""Spans of requests: where they are asked for, what they say, and that a real collector's protocol gets them."""

from __future__ import annotations

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest

from moe_prism.cli import main
from moe_prism.errors import UsageError
from moe_prism.serve.spans import Ended, SpanWriter, Stages, is_asked, need_spans, spans_of

MISSING = "opentelemetry-sdk is not installed: pip install 'moe-prism[otel]'"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
BODY = {"prompt": "def main(", "max_tokens": 3, "temperature": 0, "quality": 0.9}


def read(exporter):
    """Spans of requests, and those of stages by the request's number."""
    spans = exporter.get_finished_spans()
    exporter.clear()
    roots = [s for s in spans if s.kind.name == "SERVER"]
    return roots, [[s for s in spans if s.parent and s.parent.span_id == root.context.span_id] for root in roots]


@pytest.fixture
def exporter(house):
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason=MISSING)
    export = pytest.importorskip("opentelemetry.sdk.trace.export", reason=MISSING)
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    found, provider, service = InMemorySpanExporter(), sdk.TracerProvider(), house.built.service
    provider.add_span_processor(export.SimpleSpanProcessor(found))
    service.spans = SpanWriter(provider, service.engine.clock)
    yield found
    service.spans.close()
    service.spans = None


def test_a_request_is_a_span_below_its_clients_with_its_stages(house, exporter):
    answer = httpx2.post(f"{house.url}/completions", json=BODY, headers=HEADERS, timeout=60).json()
    [root], [stages] = read(exporter)
    assert (f"{root.context.trace_id:032x}", f"{root.parent.span_id:016x}") == (TRACE, PARENT)
    assert root.name == "text_completion tiny" and root.status.is_ok
    said = dict(root.attributes)
    assert said["gen_ai.response.id"] == answer["id"] and said["moe_prism.request_id"] == "mine"
    assert said["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert said["gen_ai.usage.output_tokens"] == 3 and said["gen_ai.response.finish_reasons"] == ("length",)
    served = answer["moe_prism"]
    assert (said["moe_prism.point"], said["moe_prism.quality"]) == (served["point"], served["quality"]) == ("half", 0.9)
    assert said["moe_prism.slots"] == served["slots"] and "moe_prism.adapter" not in said
    assert [s.name for s in stages] == ["queue", "prefill", "decode"]
    times = [root.start_time] + [t for s in stages for t in (s.start_time, s.end_time)] + [root.end_time]
    assert times == sorted(times) and stages[0].end_time == stages[1].start_time
    assert not any("main" in str(s.attributes) for s in (root, *stages)), "a span holds no text"


def test_every_sequence_of_a_stream_has_stages_of_its_own(house, exporter):
    body = {**BODY, "n": 2, "temperature": 1, "stream": True}
    with httpx2.stream("POST", f"{house.url}/completions", json=body, timeout=60) as answer:
        assert answer.read().endswith(b"[DONE]\n\n")
    assert house.idle() == []
    [root], [stages] = read(exporter)
    assert root.parent is None, "nobody named a trace"
    assert [(s.name, s.attributes["moe_prism.sequence"]) for s in stages] == [
        (name, i) for i in range(2) for name in ("queue", "prefill", "decode")
    ]


def test_a_client_that_leaves_is_told_by_its_span(house, exporter):
    body = {**BODY, "max_tokens": 100, "stream": True, "ignore_eos": True}
    with httpx2.stream("POST", f"{house.url}/completions", json=body, headers=HEADERS, timeout=60) as answer:
        next(answer.iter_bytes())
    assert house.idle() == []
    [root], _ = read(exporter)
    assert root.attributes["gen_ai.response.finish_reasons"] == ("disconnect",) and root.status.is_unset


def test_a_trace_that_is_not_recorded_by_its_client_is_not_here(house, exporter):
    unsampled = {"traceparent": HEADERS["traceparent"][:-2] + "00"}
    assert httpx2.post(f"{house.url}/completions", json=BODY, headers=unsampled, timeout=60).status_code == 200
    assert read(exporter) == ([], [])


def test_stages_of_what_did_not_come_to_its_end():
    assert list(Stages(1.0, None, None, None).until(4.0)) == [("queue", 1.0, 4.0)]
    assert list(Stages(1.0, 2.0, None, None).until(4.0)) == [("queue", 1.0, 2.0), ("prefill", 2.0, 4.0)]
    assert [name for name, _, _ in Stages(1.0, 2.0, 3.0, 3.5).until(4.0)] == ["queue", "prefill", "decode"]


class Collector(BaseHTTPRequestHandler):
    """Takes what OTLP over HTTP sends."""

    def do_POST(self):
        self.server.got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


def test_a_collector_gets_them(monkeypatch):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter", reason=MISSING)
    import gzip

    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.got = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        spans = spans_of(None, lambda: 5.0)
        stages = (Stages(1.0, 2.0, 3.0, 4.0),)
        spans.write(
            Ended(name="chat m", traceparent=None, start=1.0, end=4.0, sequences=stages, attributes={"a": 1}, failed=True)
        )
        spans.close()
    finally:
        server.shutdown()
        server.server_close()
    [(path, body)] = server.got
    sent = ExportTraceServiceRequest.FromString(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
    [resource] = sent.resource_spans
    assert path == "/v1/traces" and "moe-prism" in [a.value.string_value for a in resource.resource.attributes]
    names = [s.name for scope in resource.scope_spans for s in scope.spans]
    assert sorted(names) == ["chat m", "decode", "prefill", "queue"]


@pytest.mark.parametrize(
    ("endpoint", "environment", "asked"),
    [
        (None, {}, False),
        ("http://127.0.0.1:4318/v1/traces", {}, True),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, True),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, True),
        (None, {"OTEL_TRACES_EXPORTER": "otlp"}, True),
        (None, {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, False),
        (None, {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, False),
        (None, {"OTEL_SERVICE_NAME": "a"}, False),
    ],
)
def test_they_are_off_unless_asked_for(endpoint, environment, asked):
    assert is_asked(endpoint, environment) is asked


@pytest.mark.parametrize(
    ("endpoint", "environment", "name"),
    [
        (None, {"OTEL_TRACES_EXPORTER": "console"}, "OTEL_TRACES_EXPORTER"),
        ("http://x", {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL"),
        ("http://x", {"OTEL_SDK_DISABLED": "true"}, "OTEL_SDK_DISABLED"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(endpoint, environment, name):
    with pytest.raises(UsageError, match=name):
        is_asked(endpoint, environment)


def test_the_missing_library_is_named_before_anything_is_loaded(monkeypatch, capsys, tiny_levels):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    need_spans(None)
    assert main(["serve", str(tiny_levels), "--port", "0", "--otlp-traces-endpoint", "http://127.0.0.1:1/v1/traces"]) == 2
    said = capsys.readouterr().err
    assert "moe-prism[otel]" in said and said.count("\n") == 1
