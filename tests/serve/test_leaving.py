"""A server that leaves says so before it refuses."""

from __future__ import annotations

import asyncio
import signal
from types import SimpleNamespace

import pytest

from moe_prism.serve.config import Config
from moe_prism.serve.http.admission import Door
from moe_prism.serve.server import make_server


class App:
    async def end_all(self, seconds):
        self.ended = True


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_requests_are_taken_until_the_delay_is_over(delay):
    config = Config(bounds={"drain_delay": delay, "drain_seconds": 1})
    door, engine = Door(config, 100.0, lambda reason: None), SimpleNamespace(book={})

    async def leaves():
        server = make_server(
            App(), SimpleNamespace(service=SimpleNamespace(engine=engine), door=door, ended=lambda: False), config
        )
        server.handle_exit(signal.SIGTERM, None)
        seen = [(door.leaving, door.draining)]
        while not server.should_exit:
            await asyncio.sleep(0.01)
        return [*seen, (door.leaving, door.draining)]

    assert asyncio.run(asyncio.wait_for(leaves(), 10)) == [(True, not delay), (True, True)]


def test_a_second_signal_does_not_wait():
    config = Config(bounds={"drain_delay": 60})
    door, engine = Door(config, 100.0, lambda reason: None), SimpleNamespace(book={})

    async def leaves():
        server = make_server(
            App(), SimpleNamespace(service=SimpleNamespace(engine=engine), door=door, ended=lambda: False), config
        )
        server.handle_exit(signal.SIGTERM, None)
        server.handle_exit(signal.SIGTERM, None)
        while not server.should_exit:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(leaves(), 10))
