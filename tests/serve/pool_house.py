"""A router in this process, and upstreams that do what a test says."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import yaml

from moe_prism.serve.route.app import PoolRouter
from moe_prism.serve.route.config import read_pool
from moe_prism.serve.route.run import make_router, router_server
from moe_prism.serve.server import listen

BOUNDS = {"connect_seconds": 1.0, "first_byte_seconds": 5.0, "probe_seconds": 0.1, "idle_seconds": 5.0}
LEVELS = [{"name": "low", "quality": 0.8, "slots": 2.0}, {"name": "full", "quality": 1.0, "slots": 8.0}]


class Handler(BaseHTTPRequestHandler):
    """`server.fake` says what to answer."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *said: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self.server.fake.looks += 1
        self.say(200, self.server.fake.models)

    def do_POST(self) -> None:
        fake = self.server.fake
        fake.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        fake.headers.append({k.lower(): v for k, v in self.headers.items()})
        fake.answer(self)

    def say(self, status: int, body: Any, kind: str = "application/json", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def stream(self) -> None:
        """Begin a stream of unknown length."""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True


def usual(handler: Handler) -> None:
    handler.say(200, {"choices": [{"text": handler.server.fake.text}]}, x_moe_prism_point="low")


@dataclass
class Fake:
    """An upstream. asked: bodies that it got."""

    models: Any
    answer: Callable[[Handler], None] = usual
    text: str = "one"
    looks: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""


def listed(name: str, levels: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"data": [{"id": name, **({} if levels is None else {"operating_points": levels})}]}


@contextmanager
def fakes(*every: Fake) -> Iterator[None]:
    """Serve them until the block ends."""
    servers = []
    for fake in every:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads, server.fake = True, fake
        fake.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
    try:
        yield
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def nowhere() -> str:
    """An address on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"


@dataclass(frozen=True)
class PoolHouse:
    """url: without /v1."""

    url: str
    router: PoolRouter

    def up(self, *names: str, seconds: float = 10.0) -> None:
        """Wait until exactly these live."""
        until = time.monotonic() + seconds
        while {u.form.name for u in self.router.upstreams if u.up} != {*names}:
            assert time.monotonic() < until, [(u.form.name, u.up) for u in self.router.upstreams]
            time.sleep(0.02)

    def idle(self, seconds: float = 10.0) -> None:
        """Wait until nothing is held."""
        until = time.monotonic() + seconds
        while self.router.door.requests or any(u.running for u in self.router.upstreams):
            assert time.monotonic() < until
            time.sleep(0.02)


@contextmanager
def open_pool(folder: Path, upstreams: list[dict[str, Any]], keys: tuple[str, ...] = (), **said: Any) -> Iterator[PoolHouse]:
    """Route until the block ends; nothing may be held then."""
    bounds = {**BOUNDS, **said.pop("bounds", {})}
    path = folder / "pool.yaml"
    path.write_text(yaml.safe_dump({"upstreams": upstreams, "bounds": bounds, **said}))
    router = make_router(read_pool(path))
    listening = listen("127.0.0.1", 0)
    server = router_server(router, keys)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    house = PoolHouse(f"http://127.0.0.1:{listening.getsockname()[1]}", router)
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield house
        house.idle()
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()
    assert not thread.is_alive()


ASK = {"prompt": "the marker 7f3a", "max_tokens": 4}


def post(house, path="/v1/completions", headers=None, **fields):
    return httpx2.post(house.url + path, json={**ASK, **fields}, headers=headers, timeout=30)


def two(small, large, **more):
    return [
        {"name": "small", "url": small.url, "quality": 0.9, "cost": 1.0},
        {"name": "large", "url": large.url, "cost": 4.0, **more},
    ]


def said(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"], answer.headers["x-moe-prism-upstream"]
