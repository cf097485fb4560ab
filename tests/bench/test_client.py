"""The client: HTTP as it may be cut, streams as they may break, and a run against a server with known delays."""

from __future__ import annotations

import asyncio
import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.bench.http import Address, Broken, Call, ResponseReader
from moe_prism.bench.load import bodies, drive, request_fields, warm_up
from moe_prism.bench.outcome import FAILED, OK, REFUSED, UNFINISHED, Outcome, of_simulation, write_events
from moe_prism.bench.prompts import cut_characters, cut_tokens, fitted, prompts
from moe_prism.bench.stream import Stream
from moe_prism.bench.target import find_target
from moe_prism.bench.workload import Workload, fingerprint
from moe_prism.errors import PrismError, UsageError
from moe_prism.model.named import NANO
from moe_prism.options.bench import Offer
from moe_prism.schedule.classes import default_classes
from moe_prism.schedule.simulate import simulate
from moe_prism.schedule.workloads import Arrival, generate
from tests.bench.common import Mock, job, serving
from tests.schedule.common import LADDER, cost, policy

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4;x=1\r\nWiki\r\n5\r\npedia\r\n0\r\n\r\n"
SIZED = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nWikipedia"
OPEN = b"HTTP/1.1 200 OK\r\nserver: x\r\n\r\nWikipedia"


@given(st.sampled_from([CHUNKED, SIZED, OPEN]), st.lists(st.integers(0, 120), max_size=8))
def test_an_answer_is_the_same_however_it_is_cut(raw, cuts):
    reader, body, marks = ResponseReader(), b"", sorted({0, len(raw), *(c for c in cuts if c < len(raw))})
    for a, b in itertools.pairwise(marks):
        body += reader.feed(raw[a:b])
    reader.end()
    assert body == b"Wikipedia" and reader.done and reader.status == 200


@pytest.mark.parametrize(
    "raw", [CHUNKED[:-3], SIZED[:-1], b"HTTP/1.1 200", b"SSH-2.0\r\n\r\n", CHUNKED.replace(b"4;x=1", b"zz"), b"x" * 70_000]
)
def test_a_broken_answer_is_broken(raw):
    with pytest.raises(Broken):
        reader = ResponseReader()
        reader.feed(raw)
        reader.end()


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("localhost:8000", "http://localhost:8000/v1"),
        ("https://a.b/v1/", "https://a.b:443/v1"),
        ("http://[::1]:9/x", "http://[::1]:9/x/v1"),
    ],
)
def test_address(url, whole):
    assert Address.parse(url).url == whole


class Wire:
    """A transport that keeps what is written."""

    written = b""

    def write(self, data):
        self.written += data

    def close(self):
        pass


def test_times_are_read_from_the_clock_when_the_bytes_come():
    """With a clock and a transport of the test's own: TTFT, gaps and TPOT are exactly the clock's."""
    now = [100.0]

    async def run():
        outcome = Outcome(job(), 3)
        stream = Stream(outcome, zero=90.0)
        call = Call(lambda: now[0], stream.hear)
        call._transport = Wire()
        outcome.sent = call.send(b"x") - 90.0
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        for moment, text, finish in ((100.25, "a", None), (100.5, "", None), (101.0, "b", None), (101.25, "c", "length")):
            now[0] = moment
            data = json.dumps({"choices": [{"text": text, "finish_reason": finish}]}).encode()
            call.data_received(head + b"%x\r\ndata: %s\n\n\r\n" % (len(data) + 8, data))
            head = b""
        now[0] = 102.0
        end = b'data: {"choices": [], "usage": {"completion_tokens": 4, "prompt_tokens": 9}}\n\ndata: [DONE]\n\n'
        call.data_received(b"%x\r\n%s\r\n0\r\n\r\n" % (len(end), end))
        await call.finished
        stream.close(call.reader)
        return outcome

    o = asyncio.run(run())
    assert (o.status, o.sent, o.ttft, o.gaps, o.tokens, o.prompt) == (OK, 10.0, 0.25, [0.75, 0.25], 4, 9)
    assert o.tpot == pytest.approx(1.0 / 3) and o.end == 11.25


def arrivals(n, gap=0.01, output=3):
    return [Arrival(job(arrival=i * gap, output=output), output) for i in range(n)]


def offer(mock, count=6, patience=2.0, **about):
    """Find the server and run `count` requests."""

    async def run():
        async with serving(mock):
            target = await find_target(mock.url, **about)
            made = arrivals(count)
            sent = bodies(target, made, prompts(made, cut_characters(4.0), "x"), "none")
            return target, (await drive(target, made, sent, 1.0, patience)).outcomes

    return asyncio.run(run())


def test_a_run():
    mock = Mock(first=0.02, gap=0.01, key="secret", served={"quality": 0.9, "tokens": {"a": 3, "b": 7}})
    target, outcomes = offer(mock, key="secret")
    assert target.model == "mock" and target.context == 256 and not target.elastic
    assert len(outcomes) == 6 == len(mock.bodies)
    for o in outcomes:
        assert (o.status, o.tokens, o.prompt, o.quality, o.computed) == (OK, 3, 7, 0.9, 10)
        assert o.ttft >= 0.02 and o.tpot >= 0.009 and o.sent >= o.job.arrival
    assert all(b["max_tokens"] == 3 and b["ignore_eos"] and b["stream"] and b["temperature"] == 0 for b in mock.bodies)


def test_every_failure_is_counted(tmp_path):
    mock = Mock(faults={0: "503", 1: "400", 2: "cut", 3: "error", 4: "hang", 5: "garbage"})
    _, outcomes = offer(mock, count=7, patience=0.5)
    by_fault = sorted((o.status, o.detail) for o in outcomes)
    assert [status for status, _ in by_fault] == [FAILED] * 4 + [OK, REFUSED, UNFINISHED]
    details = " | ".join(detail for _, detail in by_fault)
    for text in ("400: no", "the step failed", "ended before the answer did", "no HTTP", "503: no"):
        assert text in details
    assert not any(o.met for o in outcomes if o.status != OK)
    write_events(tmp_path / "events.jsonl", [("run", outcomes)])
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == [o.status for o in outcomes] and lines[0]["run"] == "run"


def test_warm_up_ends_and_says_why_it_cannot():
    async def run(mock):
        async with serving(mock):
            return await warm_up(await find_target(mock.url), "text", tokens=2, most=3)

    found = asyncio.run(run(Mock(first=0.01, gap=0.002)))
    assert found["ttft"] >= 0.01 and found["tpot"] > 0
    with pytest.raises(PrismError, match="503: no"):
        asyncio.run(run(Mock(faults={0: "503"})))


@pytest.mark.parametrize(
    ("mock", "url", "about", "says"),
    [
        (Mock(key="k"), "", {}, "wants a key"),
        (Mock(), "/elsewhere", {}, "404"),
        (Mock(), "", {"model": "other"}, "choose one of: mock"),
        (Mock(card={"operating_points": [{"name": "a"}, {"name": "b"}]}), "", {}, "cannot be read"),
    ],
)
def test_wrong_address_key_or_name_is_one_line(mock, url, about, says):
    async def run():
        async with serving(mock):
            await find_target(mock.url + url, **about)

    with pytest.raises(PrismError, match=says) as error:
        asyncio.run(run())
    assert "\n" not in str(error.value)


def test_no_server_is_one_line():
    with pytest.raises(PrismError, match="no server at"):
        asyncio.run(find_target("http://127.0.0.1:9"))
    with pytest.raises(UsageError, match="no http address"):
        asyncio.run(find_target("ftp://x"))


def test_fields_say_floor_ceiling_and_targets():
    made = default_classes()["interactive"].job("r", 0.0, 8, 4, LADDER)
    said = request_fields(made, LADDER, "class")
    assert said == {"min_quality": 0.9, "quality": 1.0, "priority": 0, "class": "interactive", "ttft_ms": 450, "tpot_ms": 50}
    assert "class" not in request_fields(made, LADDER, "targets") and request_fields(made, LADDER, "none") == {}


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["chat", "burst", "classes", "longtail"]))
def test_a_seed_gives_the_same_bytes(seed, name):
    workload = Workload.of(Offer(name=name, seconds=20.0), default_classes())
    one, two = (workload.arrivals(5.0, seed, LADDER, 2048) for _ in range(2))
    assert fingerprint(one) == fingerprint(two) != fingerprint(workload.arrivals(5.0, seed + 1, LADDER, 2048))
    cut = cut_characters(4.0)
    assert prompts(one, cut, "s") == prompts(two, cut, "s") != prompts(one, cut, "t")
    assert all(a.job.output == a.length and a.job.prompt + a.length <= 2048 for a in one)


def test_prompts_have_the_length_asked_for():
    made = generate("chat", 5.0, 10.0, default_classes(), LADDER, 1)
    cut = cut_tokens(NANO)
    assert [len(p) for p in prompts(made, cut, "s")] == [a.job.prompt for a in made]
    rng = random.Random(0)
    assert len(cut_characters(3.5)(10, rng)) == 35


def test_requests_are_cut_to_the_context():
    for a in fitted(generate("longtail", 20.0, 10.0, default_classes(), LADDER, 1), 200):
        assert a.job.prompt + a.length <= 200 and a.length <= 100


def test_a_trace_is_stretched_to_the_rate(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps({"arrival": 7 + i, "class": "batch", "prompt": 5, "output": 4}) + "\n" for i in range(11)))
    workload = Workload.of(Offer(seconds=10.0, trace=path), default_classes())
    assert [a.job.arrival for a in workload.arrivals(0.0, 0, LADDER, None)] == list(range(10))
    assert [a.job.arrival for a in workload.arrivals(2.2, 0, LADDER, None)][:3] == [0, 0.5, 1.0]


@pytest.mark.parametrize("step", [1, 0.30000049])
def test_all_of_a_trace_is_offered_unless_seconds_are_given_and_it_is_read_once(tmp_path, step):
    path = tmp_path / "trace.jsonl"
    lines = [{"arrival": 7 + i * step, "class": "batch", "prompt": 5, "output": 4} for i in range(11)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    workload = Workload.of(Offer(trace=path), default_classes())
    assert workload.seconds == pytest.approx(10 * step) and workload.described()["seconds"] == workload.seconds
    path.unlink()
    assert [len(workload.arrivals(0.0, seed, LADDER, None)) for seed in range(2)] == [11, 11]
    assert Workload.of(Offer(), default_classes()).seconds == 60.0


@pytest.mark.parametrize(("text", "cause"), [("", "has no requests"), ("{}", "jsonl:1")])
def test_a_trace_that_cannot_be_replayed_is_told(tmp_path, text, cause):
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=cause):
        Workload.of(Offer(trace=path), default_classes()).arrivals(0.0, 0, LADDER, None)


def test_the_simulator_in_the_client_s_terms():
    made = fitted(generate("chat", 5.0, 10.0, default_classes(), LADDER, 3), 2048)
    run = simulate(made, policy("fifo"), cost(), LADDER)
    for o, r in zip(of_simulation(run.results, run.end), run.results, strict=True):
        assert (o.ttft, o.met, o.tokens, len(o.events)) == (pytest.approx(r.ttft), r.met, r.length, r.length)
        assert r.tpot is None or o.tpot == pytest.approx(r.tpot)
        assert o.computed == r.tokens and o.quality == r.quality
