"""A stream to a client ends with its client, whichever way the server under it says that the client has left."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("fastapi")

from moe_prism.serve.http.client_stream import ClientStream

SERVERS = ("2.0", "2.3", "2.4")


async def silent():
    """A part, and then nothing for a long time."""
    yield b"data: 1\n\n"
    await asyncio.sleep(60)


def stream(server, content, receive, send):
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": server}}
    asyncio.run(asyncio.wait_for(ClientStream(content)(scope, receive, send), 10))
    assert scope["asgi"]["spec_version"] == server  # what others see of the request stays as it was


@pytest.mark.parametrize("server", SERVERS)
def test_a_client_that_leaves_while_nothing_is_sent_ends_the_stream(server):
    sent, started = [], asyncio.Event()

    async def receive():
        await started.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)
        if message.get("body"):
            started.set()

    stream(server, silent(), receive, send)
    assert [message.get("body") for message in sent] == [None, b"data: 1\n\n"]


@pytest.mark.parametrize("server", SERVERS)
def test_a_send_that_fails_ends_the_stream_quietly(server):
    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        raise OSError

    stream(server, silent(), receive, send)


@pytest.mark.parametrize("server", SERVERS)
def test_an_error_of_what_is_sent_is_heard_of(server):
    async def breaks():
        yield b"data: 1\n\n"
        raise OSError("the disk")

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        pass

    with pytest.raises((OSError, ExceptionGroup), match=r"the disk|1 sub-exception"):
        stream(server, breaks(), receive, send)
