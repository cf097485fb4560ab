"""Times that no test asserts: an interrupt, a damaged file, a resumed run, and metrics under load (F01, F03, F06, S22).

    python benchmarks/faults.py [--only interrupt] [--rounds 3] [--tokens 16384]
    python benchmarks/faults.py --only metrics --folder ELASTIC --seconds 20

Every command is a process of its own, on prism-nano. Bars: 1 s from a second interrupt to the end, 1 s until a damaged file is refused,
5 % of the whole for what a kill costs, 50 ms for `/metrics`. Baselines in the same run: what a layer takes, the same run without a
kill, and `/metrics` without load.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attacks import Seen, normal, server

from moe_prism.checkpoint.shards import INDEX, SINGLE, Source
from moe_prism.errors import PrismError
from moe_prism.model.named import NANO

COMMAND = [sys.executable, "-m", "moe_prism"]
JOB = ["refactor", "nano", "--tokens", "16384", "--length", "256", "--profile-tokens", "1024", "--reservoir", "2048", "-o"]
UNITS = 6  # layers of nano
INTERRUPTED = 130


def cpu() -> float:
    """Processor seconds of the processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def start(words: list[str]) -> subprocess.Popen[str]:
    """A command whose words nobody reads."""
    return subprocess.Popen([*COMMAND, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)


def after(out: Path, count: int, child: subprocess.Popen[str]) -> None:
    """Wait until so many layers are finished."""
    while len(list(out.with_name(out.name + ".partial").glob("unit-*.safetensors"))) < count:
        if child.poll() is not None:
            raise SystemExit(f"the run ended early, with {child.returncode}")
        time.sleep(0.005)


def interrupt(place: Path, rounds: int) -> list[str]:
    """Seconds from the last interrupt to the end of the process, and what a layer takes."""
    ends: dict[int, list[float]] = {1: [], 2: []}
    layers: list[float] = []
    for number in range(2 * rounds):
        times, out = 1 + number % 2, place / f"interrupt-{number}"
        child = start([*JOB, str(out)])
        after(out, 1, child)
        began = time.perf_counter()
        after(out, 2, child)
        layers.append(time.perf_counter() - began)
        for i in range(times):
            time.sleep(0.05 * i)
            child.send_signal(signal.SIGINT)
        began = time.perf_counter()
        child.wait(120)
        ends[times].append(time.perf_counter() - began)
        if child.returncode not in (INTERRUPTED, -signal.SIGINT) or out.exists():
            raise SystemExit(f"an interrupt ended with {child.returncode}")
    return [
        f"one interrupt: {_span(ends[1])} s to the end; two: {_span(ends[2])} s (bar 1 s); a layer takes {_span(layers)} s",
    ]


def resume(place: Path, rounds: int) -> list[str]:
    """What a kill after half of the layers costs: processor seconds of both runs less those of one that nobody disturbs."""
    costs, wholes = [], []
    for number in range(rounds):
        spent = []
        for out, kill in ((place / f"whole-{number}", False), (place / f"killed-{number}", True)):
            before = cpu()
            child = start([*JOB, str(out)])
            if kill:
                after(out, UNITS // 2, child)
                child.kill()
                child.wait()
                child = start([*JOB, str(out), "--resume"])
            if child.wait() != 0:
                raise SystemExit(f"a run ended with {child.returncode}")
            spent.append(cpu() - before)
        wholes.append(spent[0])
        costs.append(spent[1] - spent[0])
    before = cpu()
    subprocess.run([sys.executable, "-c", "import moe_prism.jobs.refactor"], check=True)
    imports, whole, cost = cpu() - before, statistics.median(wholes), statistics.median(costs)
    return [
        f"a kill after {UNITS // 2} of {UNITS} layers: {cost:.1f} processor s more than the {whole:.1f} of the whole run "
        f"({cost / whole:.0%}, bar 5 %); {imports:.1f} of them are imports, the rest the layer at work and a second look at the source",
    ]


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / SINGLE).read_bytes()
        length = int.from_bytes(data[:8], "little")
        value = json.loads(data[8 : 8 + length])
        change(value)
        text = json.dumps(value).encode()
        (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / SINGLE).write_bytes(change((folder / SINGLE).read_bytes())) and None


def _index(shard: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        shutil.move(folder / SINGLE, folder / "model-00001-of-00002.safetensors")
        names = Source(NANO).names()
        held = dict.fromkeys(names, "model-00001-of-00002.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": {**held, "lm_head.more": shard}}))

    return damage


def _first(value: Mapping[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in value.items() if name != "__metadata__")  # type: ignore[no-any-return]


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a file cut short": _bytes(lambda data: data[:-9]),
    "a file of four bytes": _bytes(lambda data: data[:4]),
    "a header of 2^40 bytes": _bytes(lambda data: (1 << 40).to_bytes(8, "little") + data[8:]),
    "a header that is no JSON": _bytes(lambda data: data[:8] + b"\xff" + data[9:]),
    "offsets beyond the end": _header(lambda value: _first(value).update(data_offsets=[0, 1 << 40])),
    "two tensors in one place": _header(lambda value: _first(value).update(data_offsets=[8, 16])),
    "a type that is none": _header(lambda value: _first(value).update(dtype="X9")),
    "a shard that is missing": _index("model-00002-of-00002.safetensors"),
    "a shard outside": _index("../model.safetensors"),
    "a tensor that no shard has": _index("model-00001-of-00002.safetensors"),
}


def damage(place: Path, rounds: int) -> list[str]:
    """Seconds until a damaged source is refused: by the look alone, and by a whole command."""
    looks, commands = [], []
    for number, (name, spoil) in enumerate(DAMAGES.items()):
        folder = Path(shutil.copytree(NANO, place / f"damaged-{number}"))
        spoil(folder)
        for _ in range(rounds):
            began = time.perf_counter()
            try:
                Source(folder)
            except PrismError:
                looks.append(time.perf_counter() - began)
            else:
                raise SystemExit(f"{name} was not refused")
            began = time.perf_counter()
            child = start(["refactor", str(folder), "-o", str(place / "never")])
            if child.wait() != 4:
                raise SystemExit(f"{name}: {child.returncode}")
            commands.append(time.perf_counter() - began)
    return [f"{len(DAMAGES)} damages: refused in {_span(looks)} s, by a command from its start {_span(commands)} s (bar 1 s)"]


def metrics(folder: Path, seconds: float, clients: int) -> list[str]:
    """Milliseconds of `/metrics` without load and under it, from one client that asks ten times a second."""
    with server(folder) as served:
        quiet = _asked(served.url, seconds / 4)
        stop, seen = threading.Event(), Seen()
        threads = [threading.Thread(target=normal, args=(served.url, seen, stop), daemon=True) for _ in range(clients)]
        for thread in threads:
            thread.start()
        loaded = _asked(served.url, seconds)
        stop.set()
        for thread in threads:
            thread.join(60)
    return [
        f"/metrics {1e3 * statistics.median(quiet):.1f} ms without load; beside {clients} clients median "
        f"{1e3 * statistics.median(loaded):.1f}, p99 {1e3 * sorted(loaded)[int(0.99 * len(loaded))]:.1f} ms (bar 50 ms)",
    ]


def _asked(url: str, seconds: float) -> list[float]:
    times, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.perf_counter()
        with urllib.request.urlopen(url + "/metrics", timeout=30) as answer:  # noqa: S310 - ours
            answer.read()
        times.append(time.perf_counter() - began)
        time.sleep(0.1)
    return times


def _span(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def main() -> None:
    """Print the figures of each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="of the run that is interrupted or killed")
    parser.add_argument("--reservoir", type=int, default=2048, help="of its sample per expert: what solving a layer takes")
    parser.add_argument("--only", choices=["interrupt", "resume", "damage", "metrics"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="an elastic folder, for metrics")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=4)
    given = parser.parse_args()
    JOB[JOB.index("--tokens") + 1], JOB[JOB.index("--reservoir") + 1] = str(given.tokens), str(given.reservoir)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell may have started us with it ignored, and children inherit that
    parts: dict[str, Callable[[Path, int], list[str]]] = {"interrupt": interrupt, "resume": resume, "damage": damage}
    if given.only != "metrics":
        with tempfile.TemporaryDirectory() as place:
            for name, part in parts.items():
                if given.only in (None, name):
                    print("\n".join(part(Path(place), given.rounds)), flush=True)
    if given.folder is not None and given.only in (None, "metrics"):
        print("\n".join(metrics(given.folder, given.seconds, given.clients)))


if __name__ == "__main__":
    main()
