"""Streams that have begun and say nothing yet: a thousand of them are held, and every one gets its answer.

`benchmarks/streams.py` has times.
"""

from __future__ import annotations

import asyncio
import json
import resource

import httpx2
import pytest

pytest.importorskip("fastapi")

from tests.serve.house import open_house

IDLE, ACTIVE, ROOM = 1000, 64, 16
CONFIG = {
    "engine": {"process": False, "requests": ACTIVE, "step_tokens": 512, "cache_tokens": 256 * ACTIVE, "page": 16},
    "bounds": {
        "request_seconds": 3600,
        "connections": IDLE + ACTIVE + ROOM,
        "connections_per_client": IDLE + ACTIVE + ROOM,
        "queue_requests": 2 * IDLE,
        "queue_tokens": 1 << 20,
    },
}


async def begin(port, tokens, **more):
    """(reader, writer, status) of a stream whose answer has begun."""
    said = json.dumps({"prompt": "a", "max_tokens": tokens, "stream": True, "ignore_eos": True, **more}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(said)}\r\n\r\n"
    writer.write(head.encode() + said)
    got = await reader.readuntil(b"\r\n\r\n")
    return reader, writer, int(got.split()[1])


async def ends(reader):
    """What is left of an answer."""
    found = b""
    while b"[DONE]" not in found and (data := await reader.read(1 << 16)):
        found += data
    return found


class Held:
    """A policy that lets nothing of the class `batch` begin until it is told to."""

    def __init__(self, policy):
        self.policy, self.is_open = policy, False

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def step(self, now, waiting, running, limits):
        return self.policy.step(now, [p for p in waiting if self.is_open or p.job.kind != "batch"], running, limits)


async def many(house, policy):
    """(idle streams that were held at once, what clients beyond the bound were told, all answers)."""
    port, engine = house.port, house.built.service.engine
    idle = []
    for _ in range(0, IDLE, 50):
        idle += await asyncio.gather(*(begin(port, 1, **{"class": "batch"}) for _ in range(50)))
    active = await asyncio.gather(*(begin(port, 8) for _ in range(ACTIVE)))
    answers = await asyncio.gather(*(ends(reader) for reader, _, _ in active))
    held = len(engine.book)
    assert {status for _, _, status in (*active, *idle)} == {200}
    async with httpx2.AsyncClient(base_url=house.root, timeout=60) as web:
        probes = [(await web.get(path)).status_code for path in ("/health", "/ready", "/metrics")]
    assert set(probes) == {200}, "whoever looks after the server is answered"
    more = [await beyond(port) for _ in range(ACTIVE + 2 * ROOM)]
    policy.is_open = True
    answers += await asyncio.gather(*(ends(reader) for reader, _, _ in idle))
    for _, writer, _ in (*active, *idle):
        writer.close()
    for _, writer in more:
        if writer is not None:
            writer.close()
    return held, [status for status, _ in more], answers


async def beyond(port):
    """(status, connection) of one client more; None where it is closed unheard."""
    try:
        _, writer, status = await asyncio.wait_for(begin(port, 1, **{"class": "batch"}), 30)
    except (OSError, asyncio.IncompleteReadError):
        return None, None
    return status, writer


@pytest.mark.slow
def test_s07_a_thousand_streams_wait_beside_those_that_are_answered(tiny_levels):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < 4 * (IDLE + ACTIVE):
        pytest.skip(f"a process may open {hard} files only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with open_house(tiny_levels, CONFIG) as house:
        engine = house.built.service.engine
        policy = Held(engine.policy)
        engine.replace_policy(policy)
        held, told, answers = asyncio.run(many(house, policy))
        assert held == IDLE, "all of them wait, and nobody else any more"
        assert len(answers) == IDLE + ACTIVE
        assert all(b"[DONE]" in answer and b'"error"' not in answer for answer in answers)
        assert set(told) <= {200, 503, None}
        assert told.count(200) <= ACTIVE + ROOM < len(told), "those who have their answer go for newcomers, those who wait do not"
        assert house.idle() == []
