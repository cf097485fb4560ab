"""S20: a server for a long time, with faults among its requests. `make soak SECONDS=3600` runs it for that long."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

import httpx2

from tests.faults.points import fault
from tests.serve.house import open_house

SECONDS = float(os.environ.get("SOAK_SECONDS", "60"))
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
PATIENCE = 300.0  # seconds for an answer, on a machine that may stop all of us for a while
SLOPE = 1 << 20  # bytes an hour
NOISE = 8 << 20  # bytes that an allocator may keep, whatever the time
KEPT = httpx2.Limits(keepalive_expiry=1)  # well before the server closes a connection that nobody uses
REST = 0.3  # seconds of a client between two requests, so that an hour of it leaves room for other work


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Pauses:
    """When all of us were stopped last: a client that is cut off then was cut off by its deadline, not by a fault."""

    def __init__(self):
        self.last, self.count = 0.0, 0

    def run(self, stop):
        before = time.monotonic()
        while not stop.wait(0.1):
            now = time.monotonic()
            if now - before > 0.6:
                self.last, self.count = now, self.count + 1
            before = now


class Client:
    """Sends what clients send, good and bad, until it is told to stop."""

    def __init__(self, house, seed, pauses):
        self.house, self.draw, self.statuses, self.pauses = house, random.Random(seed), dict[int, int](), pauses
        self.error: Exception | None = None
        self.cut = 0

    def run(self, stop):
        with httpx2.Client(base_url=self.house.root, timeout=PATIENCE, limits=KEPT) as web:
            while not stop.wait(REST * self.draw.random() * 2) and self.error is None:
                began = time.monotonic()
                try:
                    getattr(self, self.draw.choice(("whole", "stream", "leave", "wrong", "slow", "long")))(web)
                except Exception as error:  # noqa: BLE001 - whatever ends a client early is a fault of the server's
                    time.sleep(1)  # until it is known whether we were stopped
                    self.cut += 1
                    if self.pauses.last < began or not isinstance(error, httpx2.TransportError):
                        self.error = error

    def note(self, status):
        self.statuses[status] = self.statuses.get(status, 0) + 1

    def body(self, **fields):
        prompt = "".join(self.draw.choice("abc def(x):\n 漢🙂") for _ in range(self.draw.randint(1, 60)))
        return {"prompt": prompt, "max_tokens": self.draw.randint(1, 12), "temperature": self.draw.choice((0, 1)), **fields}

    def whole(self, web):
        self.note(web.post("/v1/completions", json=self.body(n=self.draw.randint(1, 3))).status_code)

    def stream(self, web):
        with web.stream("POST", "/v1/completions", json=self.body(stream=True)) as answer:
            self.note(answer.status_code)
            last = [line for line in answer.iter_lines() if line][-1]
            assert last == "data: [DONE]" or "error" in json.loads(
                last.removeprefix("data: ")
            )  # every answer ends, in one of two ways

    def leave(self, web):
        body = json.dumps(self.body(max_tokens=60, stream=True)).encode()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.house.port), timeout=20) as link:
            link.sendall(HEAD % len(body) + body)
            link.recv(self.draw.randint(1, 400))

    def wrong(self, web):
        bad = self.draw.choice(({"n": 0}, {"stop": ["x"] * 99}, {"prompt": 3}, {"nonsense": 1}, {"quality": "none"}))
        self.note(web.post("/v1/completions", json=self.body(**bad)).status_code)

    def slow(self, web):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.house.port), timeout=20) as link:
            link.sendall(HEAD[: self.draw.randint(1, len(HEAD))])
            time.sleep(self.draw.random())

    def long(self, web):
        self.note(web.post("/v1/completions", json=self.body(prompt="7" * 200_000)).status_code)


def sometimes(draw):
    """A row in a few hundred is not finite, and now and then a step fails."""

    def broken(runner, parts, spans, logits):
        if draw.random() < 0.003:
            logits[draw.randrange(len(logits))] = float("nan")
        elif draw.random() < 0.001:
            raise MemoryError("a step that fails")

    return broken


@pytest.mark.slow
@pytest.mark.timeout(SECONDS * 2 + 600)
def test_s20_a_long_run_with_faults_leaves_nothing_behind(tiny_levels):
    bounds = {"header_seconds": 5, "body_seconds": 5, "queue_requests": 8}
    with open_house(tiny_levels, {"bounds": bounds}) as house:
        pauses, stop = Pauses(), threading.Event()
        clients = [Client(house, seed, pauses) for seed in range(6)]
        threads = [threading.Thread(target=each.run, args=(stop,), daemon=True) for each in (*clients, pauses)]
        files, samples, began = 0, list[tuple[float, int]](), time.monotonic()
        with fault("logits", sometimes(random.Random(5))):
            for thread in threads:
                thread.start()
            while (now := time.monotonic() - began) < SECONDS and not any(client.error for client in clients):
                stop.wait(min(1.0, SECONDS / 20))
                samples.append((now, resident()))
                files = files or (open_files() if now > SECONDS / 5 else 0)
            stop.set()
            for thread in threads:
                thread.join(PATIENCE)
        assert [client.error for client in clients if client.error] == []
        assert not any(thread.is_alive() for thread in threads) and house.idle() == []
        assert httpx2.post(house.root + "/v1/completions", json={"prompt": "a", "max_tokens": 2}, timeout=60).status_code == 200
        statuses = {k: sum(c.statuses.get(k, 0) for c in clients) for c in clients for k in c.statuses}
        later = samples[len(samples) // 3 :]  # caches and buffers fill first
        third = len(later) // 3
        first, last = (sorted(r for _, r in part)[len(part) // 2] for part in (later[:third], later[-third:]))
        hours = (later[-1][0] - later[0][0]) * 2 / 3 / 3600
        print(f"{sum(statuses.values())} answers {statuses}; grew {(last - first) / 1e6:.2f} MB in {hours * 60:.1f} minutes, ")
        print(f"{(last - first) / hours / 1e6:.2f} MB/h; open files {files} -> {open_files()}; ", end="")
        print(f"{sum(client.cut for client in clients)} answers cut off in {pauses.count} times in which all was stopped")
        assert set(statuses) <= {200, 400, 503} and statuses[200] > 0
        assert last - first <= SLOPE * hours + NOISE
        assert open_files() <= files + 8
