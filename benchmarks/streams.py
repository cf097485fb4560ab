"""Streams that wait: 1,000 clients whose answers have begun and say nothing yet, beside 64 that are being answered.

    python benchmarks/streams.py ELASTIC [--idle 1000] [--active 64] [--seconds 20] [--json]

The idle ones are of the class `batch`, and all places of the engine are taken by `interactive` ones, which ask again as soon as they have
their answer. Printed, without and with the idle ones: completions per second, time to the first token, and the times of /health, which
is asked five times a second; then what clients beyond the bound are told. Clients are one process beside the server, on its machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attacks import Server, quantile, resident, server

ROOM = 64  # connections beside the idle and the active ones: /health, and those that are about to close


@dataclass
class Waiting:
    """A stream that has begun, and what came of it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    status: int


@dataclass
class Phase:
    """What clients saw. Seconds."""

    done: int = 0
    first: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)

    def figures(self, seconds: float) -> dict[str, float]:
        return {
            "completions per second": round(self.done / seconds, 2),
            "median ttft ms": round(1000 * quantile(self.first, 0.5), 1),
            "p99 ttft ms": round(1000 * quantile(self.first, 0.99), 1),
            "median health ms": round(1000 * quantile(self.health, 0.5), 1),
            "p99 health ms": round(1000 * quantile(self.health, 0.99), 1),
            "worst health ms": round(1000 * max(self.health, default=0.0), 1),
        }


def config(idle: int, active: int) -> dict[str, Any]:
    """Bounds that hold so many. A quarter of the queue is kept for the first class, so the others need a third more."""
    held = idle + active + ROOM
    bounds = {"connections": held, "connections_per_client": held, "queue_requests": 2 * held, "queue_tokens": 1 << 24}
    return {"engine": {"requests": active, "cache_tokens": 256 * active}, "bounds": {**bounds, "request_seconds": 3600.0}}


def body(kind: str, tokens: int) -> bytes:
    return json.dumps(
        {"prompt": "def main(args):\n    return ", "max_tokens": tokens, "temperature": 0, "stream": True, "class": kind}
    ).encode()


async def begun(port: int, kind: str, tokens: int) -> Waiting:
    """Ask, and read the head of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    said = body(kind, tokens)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(said)}\r\n\r\n"
    writer.write(head.encode() + said)
    got = await reader.readuntil(b"\r\n\r\n")
    return Waiting(reader, writer, int(got.split()[1]))


async def keep_asking(port: int, phase: Phase, stop: asyncio.Event) -> None:
    while not stop.is_set():
        began = time.monotonic()
        link = await begun(port, "interactive", 16)
        told, has_begun = b"", False
        while b"[DONE]" not in told and (data := await link.reader.read(1 << 16)):
            told += data
            if not has_begun and b'"text"' in told:
                has_begun = True
                phase.first.append(time.monotonic() - began)
        phase.done += b"[DONE]" in told
        link.writer.close()


async def ask_health(port: int, phase: Phase, stop: asyncio.Event) -> None:
    while not stop.is_set():
        began = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        await reader.read()
        phase.health.append(time.monotonic() - began)
        writer.close()
        await asyncio.sleep(0.2)


async def phase_of(port: int, active: int, seconds: float) -> Phase:
    found, stop = Phase(), asyncio.Event()
    tasks = [asyncio.create_task(keep_asking(port, found, stop)) for _ in range(active)]
    await asyncio.sleep(2)
    found.done, found.first = 0, []
    tasks.append(asyncio.create_task(ask_health(port, found, stop)))
    await asyncio.sleep(seconds)
    done = found.done
    stop.set()
    await asyncio.wait(tasks, timeout=60)
    found.done = done
    return found


async def hold(port: int, idle: int) -> list[Waiting]:
    """Streams that wait, opened a few at a time."""
    held: list[Waiting] = []
    for start in range(0, idle, 50):
        held += await asyncio.gather(*(begun(port, "batch", 1) for _ in range(min(50, idle - start))))
    return held


async def beyond(port: int, count: int) -> dict[str, int]:
    """What clients are told for whom there is no connection."""
    seen: Counter[str] = Counter()
    links = []
    for _ in range(count):
        try:
            links.append(await asyncio.wait_for(begun(port, "batch", 1), 5))
            seen[str(links[-1].status)] += 1
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            seen["closed"] += 1
    for link in links:
        link.writer.close()
    return dict(seen)


async def measured(there: Server, given: argparse.Namespace) -> dict[str, Any]:
    port = int(there.url.rpartition(":")[2])
    await phase_of(port, given.active, 2)  # warm
    alone = await phase_of(port, given.active, given.seconds)
    before = resident(there.pid)
    busy, stop = Phase(), asyncio.Event()
    tasks = [asyncio.create_task(keep_asking(port, busy, stop)) for _ in range(given.active)]  # so that the others wait
    await asyncio.sleep(1)
    held = await hold(port, given.idle)
    task = asyncio.create_task(phase_of(port, 0, given.seconds))
    busy.done, busy.first = 0, []
    found = await task
    busy.health, done = found.health, busy.done
    silent = sum(b"data:" not in bytes(link.reader._buffer) for link in held)  # type: ignore[attr-defined]
    more = await beyond(port, 2 * ROOM)
    stop.set()
    await asyncio.wait(tasks, timeout=60)
    busy.done = done
    row = {
        "idle": given.idle,
        "begun": sum(link.status == 200 for link in held),
        "still silent at the end": silent,
        "active": given.active,
        "without": alone.figures(given.seconds),
        "with": busy.figures(given.seconds),
        "server grew MB": round((resident(there.pid) - before) / 1e6, 1),
        "beyond the bound": more,
    }
    for link in held:
        link.writer.close()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--idle", type=int, default=1000)
    parser.add_argument("--active", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "qos.yaml"
        file.write_text(json.dumps(config(given.idle, given.active)))
        with server(given.folder, "--config", str(file)) as there, contextlib.suppress(KeyboardInterrupt):
            row = asyncio.run(measured(there, given))
            print(json.dumps(row) if given.json else json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
