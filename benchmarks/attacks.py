"""A server beside attackers: what normal clients get, alone and while others send prompts of a megabyte, chats whose template never ends,
and 2,000 connections that say almost nothing, of each kind.

    python benchmarks/attacks.py ELASTIC --seconds 20

Both phases run on one server, in turns. Figures are ratios, but for health. Attackers are a process of their own, with addresses of their
own and the lowest priority: on a network they would have machines of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
SLOW = {
    "nothing": b"",
    "headers": POST,
    "a body that is read": POST + b"content-length: 1000000\r\n\r\n",
    "a body that nobody reads": b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n",
}


@dataclass
class Seen:
    """What normal clients saw. Seconds."""

    done: int = 0
    refused: int = 0
    ttft: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)

    def figures(self, seconds: float) -> dict[str, float]:
        """Completions per second, and high percentiles."""
        return {
            "per second": self.done / seconds,
            "refused": self.refused,
            "p99 ttft ms": 1000 * quantile(self.ttft, 0.99),
            "median ttft ms": 1000 * quantile(self.ttft, 0.5),
            "p99 health ms": 1000 * quantile(self.health, 0.99),
            "worst health ms": 1000 * max(self.health, default=0.0),
        }


def quantile(values: list[float], share: float) -> float:
    """Of sorted values; 0 of none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def post(url: str, body: bytes, timeout: float) -> Iterator[bytes]:
    """Lines of an answer."""
    request = urllib.request.Request(url, body, {"content-type": "application/json"})  # noqa: S310 - ours
    with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310
        yield from answer


def normal(url: str, seen: Seen, stop: threading.Event) -> None:
    """One client after another answer."""
    body = json.dumps({"prompt": "def main(args):\n    return ", "max_tokens": 8, "temperature": 0, "stream": True}).encode()
    while not stop.is_set():
        began = time.monotonic()
        try:
            lines = post(url + "/v1/completions", body, 30)
            next(lines)
            seen.ttft.append(time.monotonic() - began)
            seen.done += b"[DONE]" in b"".join(lines)
        except OSError:
            seen.refused += 1


def ask_health(url: str, seen: Seen, stop: threading.Event) -> None:
    """A probe, five times a second."""
    while not stop.wait(0.2):
        began = time.monotonic()
        with contextlib.suppress(OSError), urllib.request.urlopen(url + "/health", timeout=30) as answer:  # noqa: S310
            answer.read()
        seen.health.append(time.monotonic() - began)


def keep_sending(url: str, path: str, body: bytes, stop: threading.Event) -> None:
    """One attacker, again and again."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    while not stop.is_set():
        link = http.client.HTTPConnection(host, int(port), timeout=60, source_address=("127.0.0.10", 0))
        with contextlib.suppress(OSError, http.client.HTTPException):
            link.request("POST", path, body, {"content-type": "application/json"})
            link.getresponse().read()
        link.close()


def hold_connections(port: int, count: int, stop: threading.Event) -> None:
    """`count` connections of each slow kind, one byte a second each, opened again when they are closed."""
    links: dict[int, socket.socket] = {}
    kinds = list(SLOW.values())
    while not stop.is_set():
        for i in range(count * len(kinds)):
            if stop.is_set():
                break
            link = links.get(i)
            try:
                if link is None:
                    link = links[i] = socket.socket()
                    link.bind((f"127.0.0.{2 + i % 8}", 0))
                    link.settimeout(1)
                    link.connect(("127.0.0.1", port))
                    link.sendall(kinds[i % len(kinds)])
                    link.setblocking(False)
                else:
                    link.send(b"x")
            except BlockingIOError:
                pass
            except OSError:
                link = links.pop(i, None)
                if link is not None:
                    link.close()
        stop.wait(1)
    for link in links.values():
        link.close()


@dataclass(frozen=True)
class Attack:
    """How many of each kind."""

    prompts: int
    chats: int
    connections: int

    def run(self, url: str) -> None:
        """Until killed. Nice: attackers have machines of their own, and ours has work to do."""
        os.nice(19)
        never, port = threading.Event(), int(url.rpartition(":")[2])
        large = json.dumps({"prompt": "7" * 1_000_000}).encode()
        chat = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()
        sent = [("/v1/completions", large)] * self.prompts + [("/v1/chat/completions", chat)] * self.chats
        for path, body in sent:
            threading.Thread(target=keep_sending, args=(url, path, body, never), daemon=True).start()
        hold_connections(port, self.connections, never)


@contextlib.contextmanager
def attacked(url: str, attack: Attack | None) -> Iterator[None]:
    """In another process, so that those who measure do not wait for its interpreter."""
    if attack is None:
        yield
        return
    process = multiprocessing.get_context("spawn").Process(target=attack.run, args=(url,), daemon=True)
    process.start()
    time.sleep(3)
    try:
        yield
    finally:
        process.kill()
        process.join()


def measure(url: str, seconds: float, clients: int, attack: Attack | None = None) -> Seen:
    """One phase."""
    seen, calm = Seen(), threading.Event()
    with attacked(url, attack):
        own = [threading.Thread(target=normal, args=(url, seen, calm), daemon=True) for _ in range(clients)]
        own.append(threading.Thread(target=ask_health, args=(url, seen, calm), daemon=True))
        for thread in own:
            thread.start()
        time.sleep(seconds)
        calm.set()
        for thread in own:
            thread.join(65)
    return seen


def resident(pid: int) -> int:
    """Bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


@dataclass(frozen=True)
class Server:
    """A server that runs: its address, and the pid of what answers HTTP and, if it has one, of its engine."""

    url: str
    pid: int
    engine: int


@contextlib.contextmanager
def server(folder: Path, *arguments: str, template: str = "") -> Iterator[Server]:
    """A server of a folder, or of a copy of it with another chat template, until the block ends."""
    with tempfile.TemporaryDirectory() as place:
        model = folder
        if template:
            model = Path(place) / "model"
            shutil.copytree(folder, model)
            (model / "chat_template.jinja").write_text(template)
        command = [sys.executable, "-m", "moe_prism", "serve", str(model), "--port", "0", "--probe-seconds", "1", *arguments]
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert child.stderr is not None
        ready: dict[str, Any] = {}
        for line in child.stderr:
            if line.startswith("{") and (ready := json.loads(line)).get("event") == "ready":
                break
        said = list[str]()
        threading.Thread(target=said.extend, args=(child.stderr,), daemon=True).start()
        try:
            yield Server(ready["url"].removesuffix("/v1"), child.pid, ready["engine"])
        except OSError:
            sys.stderr.writelines(said[-40:])  # it is no longer there: its last words
            raise
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait(60)


def main() -> None:
    """Print the figures of both phases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--chats", type=int, default=20)
    parser.add_argument("--connections", type=int, default=2000)
    given = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    attack = Attack(given.prompts, given.chats, given.connections)
    with server(given.folder, template=LOOPS) as there:
        url = there.url
        measure(url, 2, given.clients)  # warm
        for number in range(given.rounds):
            before = resident(there.pid)
            alone = measure(url, given.seconds, given.clients).figures(given.seconds)
            beside = measure(url, given.seconds, given.clients, attack).figures(given.seconds)
            ratios = {
                "goodput": beside["per second"] / alone["per second"],
                "p99 ttft": beside["p99 ttft ms"] / alone["p99 ttft ms"],
                "server grew MB": (resident(there.pid) - before) / 1e6,
            }
            print(json.dumps({"round": number, "alone": alone, "attacked": beside, "ratios": ratios}), flush=True)


if __name__ == "__main__":
    if os.name != "posix":
        sys.exit("this benchmark needs POSIX")
    main()
