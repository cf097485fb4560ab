"""A server whose engine is killed, or hangs: how long its clients wait for an end, and how long until it answers again.

    python benchmarks/restart.py ELASTIC --times 5

Bars: whoever is in flight has an error within a second, and the server answers within 10 s, also where the engine hung (counted from the
moment it was given up, after `bounds.step_seconds`). Baseline of the second: what the first start took, in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from attacks import post, server

STEP_SECONDS = 3.0
BODY = {"prompt": "def main(args):\n    return ", "max_tokens": 400, "temperature": 0, "ignore_eos": True}


def ask(url: str, ends: list[float], stream: bool) -> None:
    """One client in flight; when its answer ended."""
    body = json.dumps({**BODY, "stream": stream}).encode()
    with contextlib.suppress(OSError):
        b"".join(post(url + "/v1/completions", body, 120))
    ends.append(time.monotonic())


def get(url: str) -> dict[str, Any]:
    """The JSON of a page, whatever its status."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - ours
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        return dict(json.load(error))


def once(url: str, engine: int, how: signal.Signals, clients: int) -> dict[str, float]:
    """Seconds from the fault to the last end of those in flight, and to an answer."""
    ends: list[float] = []
    threads = [threading.Thread(target=ask, args=(url, ends, i % 2 == 0), daemon=True) for i in range(clients)]
    for thread in threads:
        thread.start()
    while get(url + "/ready")["requests"] < clients and len(ends) < clients:
        time.sleep(0.005)
    began = time.monotonic()
    os.kill(engine, how)
    for thread in threads:
        thread.join(120)
    while get(url + "/ready")["status"] != "ready":
        time.sleep(0.02)
    b"".join(post(url + "/v1/completions", json.dumps({**BODY, "max_tokens": 1}).encode(), 60))
    return {"in flight s": max(ends) - began, "answers again s": time.monotonic() - began}


def main() -> None:
    """Print the seconds of every fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--clients", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        config = Path(place) / "qos.yaml"
        config.write_text(json.dumps({"bounds": {"step_seconds": STEP_SECONDS}}))
        for how in (signal.SIGKILL, signal.SIGSTOP):
            for number in range(given.times):  # a server each: after a fault it has fewer tries left
                began = time.monotonic()
                with server(given.folder, "--config", str(config)) as there:
                    first = time.monotonic() - began
                    ask(there.url, [], stream=False)  # what a fresh machine compiles in the middle of a step is no hanging
                    found = once(there.url, there.engine, how, given.clients)
                    known = {"fault": how.name, "round": number, "first start s": first, **found}
                    if how is signal.SIGSTOP:
                        known |= {
                            "bound s": STEP_SECONDS,
                            "after it was given up s": found["answers again s"] - found["in flight s"],
                        }
                    print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in known.items()}), flush=True)


if __name__ == "__main__":
    main()
