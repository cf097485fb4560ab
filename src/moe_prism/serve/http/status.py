"""The live status page: one static page, and the numbers it draws."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ...schedule.base import Ladder
from ..backend import Tally

if TYPE_CHECKING:
    from .admission import Door
    from .service import Service

SECONDS = 300  # of history


@dataclass
class Second:
    """What the engine did within one second. Means are over tokens."""

    at: int  # seconds on the history's clock
    steps: int = 0
    tokens: int = 0  # prompt and generated
    generated: int = 0
    quality: float = 0.0
    slots: float = 0.0  # K
    busy: float = 0.0  # seconds spent in steps

    def add(self, step: Tally, ladder: Ladder) -> None:
        """Count a step into this second."""
        new = step.tokens
        if new:
            quality, slots = ladder.mean(step.levels)
            share = new / (self.tokens + new)
            self.quality += share * (quality - self.quality)
            self.slots += share * (slots - self.slots)
        self.steps += 1
        self.tokens += new
        self.generated += step.generated
        self.busy += step.seconds


class History:
    """The last minutes, second by second. Written by the engine's observer, read by the event loop."""

    def __init__(self, ladder: Ladder, clock: Callable[[], float] = time.monotonic) -> None:
        self.ladder, self.clock = ladder, clock
        self._started = clock()
        self._seconds: deque[Second] = deque(maxlen=SECONDS)

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self.clock() - self._started

    def observe(self, step: Tally) -> None:
        """After every step, in the thread of the engine's observer."""
        second = int(self.now)
        if not self._seconds or self._seconds[-1].at != second:
            self._seconds.append(Second(second))
        self._seconds[-1].add(step, self.ladder)

    def recent(self) -> list[dict[str, Any]]:
        """The seconds in which something ran, oldest first."""
        since = self.now - SECONDS
        return [asdict(second) for second in list(self._seconds) if second.at >= since]


def snapshot(service: Service, door: Door, history: History) -> dict[str, Any]:
    """What the page draws: levels, history, queues and targets per class."""
    queues = {kind: {"waiting": 0, "running": 0} for kind in service.config.classes}
    for request in list(service.engine.book.values()):
        state = "waiting" if request.track.level is None else "running"
        queues[request.job.kind][state] += 1
    return {
        "model": service.name,
        "chat": getattr(service.tokenizer, "chat_template", None) is not None,
        "policy": service.engine.policy_name,
        "draining": door.leaving,
        "now": round(history.now, 3),
        "span": SECONDS,
        "levels": [asdict(level) for level in service.ladder.levels],
        "seconds": history.recent(),
        "queues": queues,
        "targets": _targets(service),
        "experts": _experts(service),
        "latency": {kind: _latency(service, kind) for kind in service.config.classes},
    }


def _latency(service: Service, kind: str) -> dict[str, dict[str, float] | None]:
    """Of the last requests of a class: time to the first token, and mean time of a further one."""
    return {what: service.metrics.percentiles(what, kind) for what in ("ttft", "tpot")}


def _experts(service: Service) -> dict[str, float | None] | None:
    """Of experts on disk, means since the start; None where all are in memory."""
    now = service.engine.gauges().reads
    if now is None:
        return None
    tokens, steps = max(1, now.tokens), max(1, now.steps)
    return {
        "miss_rate": now.missed / max(1, now.requested),
        "bytes_per_token": now.bytes / tokens,
        "stall_ms_per_token": 1e3 * now.waited / tokens,
        "records_per_step": now.requested / steps,
        "hit_rate": now.hit_rate,
        "best_hit_rate": now.bound,
    }


def _targets(service: Service) -> dict[str, dict[str, dict[str, int]]]:
    """class -> target -> met and missed requests since the start."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for family in service.metrics.slo.collect():
        for sample in family.samples:
            if sample.name.endswith("_total"):
                row = found.setdefault(sample.labels["class"], {}).setdefault(sample.labels["target"], {"met": 0, "missed": 0})
                row["met" if sample.labels["met"] == "true" else "missed"] += int(sample.value)
    return found


@cache
def page() -> tuple[str, dict[str, str]]:
    """The page and its headers. Scripts and styles run by their hash, so nothing a model says can become one."""
    text = files(__package__).joinpath("status.html").read_text(encoding="utf-8")
    hashes = {tag: _hash(re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)) for tag in ("script", "style")}
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, {"content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


def _hash(found: re.Match[str] | None) -> str:
    assert found is not None
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"
