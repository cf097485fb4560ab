"""The engine in a process of its own: what goes over the wire, and answers that are those of an engine in a thread."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_prism.errors import CorruptError, PrismError, UsageError
from moe_prism.options.serve import ServeOptions
from moe_prism.point import FULL
from moe_prism.schedule.base import Job, Ladder, Level
from moe_prism.serve.backend import Gauges, Tally
from moe_prism.serve.config import Config, read_config
from moe_prism.serve.http.metrics import Metrics
from moe_prism.serve.process import engine_main
from moe_prism.serve.process.messages import Cancel, Facts, Failed, Frames, Link, News, Start, Submit, pack
from moe_prism.serve.process.remote_engine import RemoteEngine
from moe_prism.serve.requests import Event, Request, Sampling
from moe_prism.serve.server import run
from moe_prism.store import StoreOptions
from moe_prism.store.choose_misses import Misses
from tests.serve.house import open_house

LADDER = Ladder((Level("low", FULL.with_budget(0.5), 4.0, 0.8), Level("full", FULL, 8.0, 1.0)))
FACTS = Facts(
    [level.to_json() for level in LADDER.levels], 64, frozenset({1}), 100, "Fifo", 1000.0, "ladder.json", "measured", {}
)
PROMPT = "def main(args):\n    return "
messages = st.lists(st.builds(Cancel, st.text(max_size=200)) | st.builds(Failed, *[st.text(max_size=20)] * 3), max_size=6)


@given(messages, st.lists(st.integers(1, 300), min_size=1, max_size=20))
def test_frames_give_back_the_messages_however_the_bytes_come(sent, cuts):
    data = b"".join(pack(m) for m in sent)
    frames, found, at = Frames(), [], 0
    for cut in [*cuts, len(data)]:
        found += frames.feed(data[at : at + cut])
        at += cut
    assert found == sent


def test_a_link_carries_large_messages_and_ends():
    ours, theirs = (Link(end) for end in socket.socketpair())
    large = Cancel("x" * 1_000_000)
    with ours.socket, theirs.socket:
        sender = threading.Thread(target=ours.send, args=(large,))
        sender.start()
        assert theirs.receive() == large
        sender.join()
        ours.end()
        with pytest.raises(EOFError):
            theirs.receive()
        with pytest.raises(OSError):
            ours.send(Cancel("a"))


class FakeProcess:
    """Stands for EngineProcess; the test itself is the engine, at the other end of the socket."""

    pid = 0

    def __init__(self):
        ours, theirs = socket.socketpair()
        self.link, self.other = Link(ours), Link(theirs)

    def outcome(self):
        return "was killed by signal 9"

    def stop(self):
        self.link.socket.close()


def request(name, heard, deadline=None):
    return Request(Job(name, 0.0, 3, 8), [5, 6, 7], Sampling(), frozenset({1}), heard.append, deadline)


def with_engine(play):
    """Run `play(engine, process)` on a loop."""
    process = FakeProcess()
    engine = RemoteEngine(process, FACTS)

    async def scene():
        await engine.attach()
        await play(engine, process)
        await engine.detach()

    with process.other.socket:
        asyncio.run(scene())
        engine.stop()
    return engine


async def until(check):
    async with asyncio.timeout(10):
        while not check():
            await asyncio.sleep(0.001)


def test_a_request_goes_out_and_its_events_come_back():
    heard, tallies = [], []

    async def play(engine, process):
        engine.observer = tallies.append
        first, second = request("a", heard, deadline=12.5), request("b", [])
        engine.submit(first)
        engine.submit(second)
        with pytest.raises(UsageError, match="in use"):
            engine.submit(second)
        engine.cancel("b")
        engine.cancel("nobody")
        sent = [process.other.receive() for _ in range(3)]
        assert sent[0] == Submit(first.job, [5, 6, 7], Sampling(), frozenset({1}), 12.5)
        assert sent[1].job.id == "b" and sent[2] == Cancel("b") and set(engine.book) == {"a"}
        tally = Tally(0.1, 0.01, {0: 3, 1: 1}, 3, 1)
        parts, events = (("a", 0, 3, 2), ("b", 0, 3, 0)), (("a", Event(42, level=0)), ("b", Event(1, level=0)))
        process.other.send(News(7.0, Gauges(1, 0, 0.5, 2), tally, parts, events))
        await until(lambda: heard)
        assert (engine.last_turn, engine.gauges(), tallies) == (7.0, Gauges(1, 0, 0.5, 2), [tally])
        assert (first.levels, first.cached_tokens, first.track.level, heard[0].token) == ({0: 3}, 2, 0, 42)
        last = ("a", Event(43, level=1, finish="length"))
        process.other.send(News(8.0, Gauges(), tally, (("a", 1, 1, 2),), (last,)))
        await until(lambda: len(heard) == 2)
        assert heard[1].finish == "length" and first.levels == {0: 3, 1: 1} and not engine.book and not second.levels

    engine = with_engine(play)
    assert not engine.alive and engine.ended() is None
    with pytest.raises(PrismError, match="has stopped"):
        engine.submit(request("c", heard))


def test_an_engine_that_ends_by_itself_ends_its_requests(caplog):
    heard = []

    async def play(engine, process):
        engine.submit(request("a", heard))
        process.other.end()
        await until(lambda: heard)
        assert heard[0].error == "the engine stopped" and not engine.alive and not engine.book
        with pytest.raises(PrismError, match="has stopped"):
            engine.submit(request("b", heard))
        engine.cancel("a")

    engine = with_engine(play)
    assert engine.ended() == "the engine's process was killed by signal 9" and len(heard) == 1
    assert [r.getMessage() for r in caplog.records if r.levelname == "ERROR"] == [engine.ended()]


def test_submitting_never_waits_for_a_process_that_does_not_read():
    async def play(engine, process):
        for i in range(50):
            engine.submit(Request(Job(str(i), 0.0, 1, 1), list(range(20_000)), Sampling(), frozenset(), lambda e: None))
        assert len(engine.book) == 50

    with_engine(play)


def test_what_the_engine_refuses_is_told():
    ours, theirs = (Link(end) for end in socket.socketpair())

    class Full:
        last_turn = 3.0

        def gauges(self):
            return Gauges()

        def submit(self, request):
            raise self.error

    with ours.socket, theirs.socket:
        engine = Full()
        for engine.error, told in (
            (PrismError("the engine has stopped", "restart"), "the engine has stopped"),
            (ValueError("a prompt"), "the engine could not take the request"),
        ):
            engine_main._submit(
                Submit(Job("a", 0.0, 1, 1), [1], Sampling(), frozenset(), None), engine, engine_main.Outbox(ours, engine)
            )
            assert theirs.receive().events == (("a", Event(error=told)),)


def crossed(error):
    (found,) = Frames().feed(pack(engine_main.told(error)))
    return found.error()


def test_errors_cross_the_border():
    explained = crossed(CorruptError("bad file", "get another"))
    assert (type(explained), explained.cause, explained.next_step, explained.exit_code) == (
        CorruptError,
        "bad file",
        "get another",
        4,
    )
    assert "in the engine's process" in str(crossed(OSError(28, "full"))) and "[Errno 28] full" in str(
        crossed(OSError(28, "full"))
    )
    assert type(Failed("SystemExit", "x", "").error()) is RuntimeError  # only our own errors are looked up


@pytest.mark.parametrize("misses", [Misses(0.5), Misses(shares=(0.5, 0.9))])
def test_a_start_crosses_the_border_without_the_key(misses):
    options = ServeOptions(
        api_key="s3cret",
        points=("a", "b"),
        config=Path("/x"),
        store=StoreOptions(5, Path("/y"), misses=misses, fitted=Path("/z"), horizon=2),
    )
    config = read_config({"classes": {"a": {"ttft_ms": 5}}, "engine": {"requests": 3}})
    data = pack(Start.of(Path("/m"), options, config, {"version": 1}))
    (found,) = Frames().feed(data)
    assert b"s3cret" not in data
    assert found.read() == (Path("/m"), replace(options, api_key=None), config) and found.cost == {"version": 1}


def test_a_server_whose_engine_ended_fails_at_the_end(monkeypatch, tmp_path):
    """Whoever supervises it learns by the exit code."""
    stopped = []
    engine = SimpleNamespace(policy_name="Fifo", pid=0, clock=time.monotonic)
    service = SimpleNamespace(engine=engine, name="m", ladder=LADDER)
    built = SimpleNamespace(service=service, house=None, door=None, history=None, facts=FACTS, stop=lambda: stopped.append(1))
    built.ended = lambda: "the engine's process was killed by signal 9"
    monkeypatch.setattr("moe_prism.serve.build.build", lambda *a: built)
    monkeypatch.setattr("moe_prism.serve.http.app.create_app", lambda *a: None)
    monkeypatch.setattr("moe_prism.serve.server.make_server", lambda *a: SimpleNamespace(run=lambda sockets: None))
    with socket.socket() as listening, pytest.raises(PrismError, match="signal 9"):
        listening.bind(("127.0.0.1", 0))
        run(tmp_path, ServeOptions(), Config(), listening)
    assert stopped == [1]


def test_failed_steps_are_counted_once():
    metrics = Metrics("m", ["standard"], LADDER)
    metrics.set_gauges(Gauges(failed_steps=2))
    metrics.set_gauges(Gauges(3, 4, 0.5, failed_steps=2))
    assert metrics.failed._value.get() == 2 and metrics.running._value.get() == 3


@pytest.fixture(scope="module")
def both(tiny_levels):
    """The same server twice, its engine in a thread and in a process."""
    engine = {"requests": 4, "step_tokens": 64, "cache_tokens": 2048, "page": 16}
    with (
        open_house(tiny_levels) as near,
        open_house(tiny_levels, {"engine": {**engine, "process": True}}) as far,
        httpx2.Client(base_url=near.root, timeout=30) as one,
        httpx2.Client(base_url=far.root, timeout=30) as other,
    ):
        yield far, one, other
        assert near.idle() == [] and far.idle() == []
    with pytest.raises(ProcessLookupError):
        os.kill(far.built.service.engine.pid, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"quality": 1.0},
        {"quality": "low", "n": 3, "temperature": 0.9, "seed": 4},
        {"quality": "half", "max_tokens": 1, "echo": True, "logprobs": 2},
        {"quality": 1.0, "prompt": ["x = ", PROMPT * 3]},
    ],
    ids=["greedy", "seeds", "logprobs", "prompts"],
)
def test_answers_are_those_of_an_engine_in_a_thread(both, fields):
    _, one, other = both
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, **fields}
    near, far = (web.post("/v1/completions", json=body).json() for web in (one, other))
    for key in ("choices", "usage", "moe_prism"):
        assert far[key] == near[key]


def test_the_prefix_cache_and_the_counters_reach_the_http_side(both):
    house, _, web = both
    body = {"prompt": "for i in range(10):\n" * 6, "max_tokens": 3, "temperature": 0, "quality": 1.0}
    before = house.built.service.metrics.generated._value.get()
    cached = [web.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2)]
    assert cached[0] == 0 < cached[1]
    assert house.built.service.metrics.generated._value.get() - before == 6
    assert "moe_prism:kv_cache_usage_perc" in web.get("/metrics").text and web.get("/ready").json()["status"] == "ready"
    assert web.get("/status.json").json()["seconds"][-1]["tokens"] > 0


def test_s04_a_client_that_leaves_frees_its_place_in_the_engine(both):
    house, _, web = both
    body = {"prompt": PROMPT, "max_tokens": 110, "temperature": 0, "stream": True}
    for _ in range(4):
        with web.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_bytes())
    assert house.idle() == []
    count = house.built.service.metrics.generated._value.get()
    assert house.idle() == [] and house.built.service.metrics.generated._value.get() == count
