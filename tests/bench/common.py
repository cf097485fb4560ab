"""Outcomes written by hand, and a server in this process whose answers come after delays that are known."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from moe_prism.bench.outcome import OK, Outcome
from moe_prism.bench.target import PLAIN
from moe_prism.schedule import Job
from moe_prism.schedule.classes import default_classes


def outcome(
    due=0.0, first=0.1, gap=0.02, tokens=5, ttft=None, tpot=None, kind="standard", status=OK, sent=None, **fields
) -> Outcome:
    """A request that was sent when due and got a token every `gap` seconds after the first."""
    sent = due if sent is None else sent
    events = [sent + first + i * gap for i in range(tokens)] if tokens else []
    job = Job("r", due, 10, max(tokens, 1), ttft=ttft, tpot=tpot, kind=kind)
    end = events[-1] if events else None
    return Outcome(job, tokens, sent, events, end, tokens, 10, status, **fields)


def job(name="standard", arrival=0.0, prompt=8, output=4) -> Job:
    return default_classes()[name].job("r", arrival, prompt, output, PLAIN)


@dataclass
class Mock:
    """What the server does, and what it was sent. fault: of the n-th stream, by number."""

    first: float = 0.0
    gap: float = 0.0
    key: str | None = None
    card: dict[str, Any] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)
    served: dict[str, Any] | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        lengths = [line.split(":")[1] for line in head.split("\r\n") if line.startswith("content-length")]
        raw = await reader.readexactly(int(lengths[0])) if lengths else b""
        if self.key and f"authorization: bearer {self.key}" not in head:
            return plain(writer, 401, {"error": {"message": "wrong key"}})
        if head.startswith("get /v1/models "):
            return plain(writer, 200, {"data": [{"id": "mock", "max_model_len": 256, **self.card}]})
        if not head.startswith("post /v1/completions "):
            return plain(writer, 404, {"detail": "Not Found"})
        body = json.loads(raw)
        if not body.get("stream"):
            return plain(writer, 200, {"usage": {"prompt_tokens": max(1, len(body["prompt"]) // 4)}})
        self.bodies.append(body)
        await self._stream(writer, body, self.faults.get(len(self.bodies) - 1))
        return None

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any], fault: str | None) -> None:
        if fault in ("503", "400"):
            return plain(writer, int(fault), {"error": {"message": "no"}})
        if fault == "garbage":
            writer.write(b"SSH-2.0-hello\r\n\r\n")
            return None
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        await asyncio.sleep(60 if fault == "hang" else self.first)
        count = body["max_tokens"]
        for i in range(count):
            if i == 1 and fault == "cut":
                return None
            if i == 1 and fault == "error":
                event(writer, {"error": {"message": "the step failed"}})
                return None
            event(writer, {"choices": [{"text": "x", "finish_reason": "length" if i == count - 1 else None}]})
            await asyncio.sleep(self.gap)
        served = {"moe_prism": self.served} if self.served else {}
        event(writer, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": count}, **served})
        event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")
        return None


def plain(writer: asyncio.StreamWriter, status: int, data: dict[str, Any]) -> None:
    raw = json.dumps(data).encode()
    writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(raw)) + raw)


def event(writer: asyncio.StreamWriter, data: dict[str, Any] | str) -> None:
    raw = b"data: " + (data if isinstance(data, str) else json.dumps(data)).encode() + b"\n\n"
    writer.write(b"%x\r\n" % len(raw) + raw + b"\r\n")


@asynccontextmanager
async def serving(mock: Mock) -> AsyncIterator[Mock]:
    server = await asyncio.start_server(mock.handle, "127.0.0.1", 0)
    mock.port = server.sockets[0].getsockname()[1]
    async with server:
        yield mock
