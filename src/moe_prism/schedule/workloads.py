"""Arrivals to replay: seeded generators, and traces as JSON lines.

A trace line is {"arrival": seconds, "class": name, "prompt": tokens, "output": most tokens, "length": tokens generated}; `length` may
be left out (then it is `output`), and so may `floor`, a quality that replaces the class's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptError, UsageError
from ..files import read_bounded, replace_file
from ..schema import check, decode
from ..schema.trace import RequestLine
from .base import Job, Ladder
from .classes import RequestClass

MOST_BYTES = 256 << 20  # of a file of requests
MIX = {"interactive": 0.2, "standard": 0.5, "batch": 0.3}
PEAK = (0.45, 0.6)  # when, as shares of the duration, the day curve is at three times its level

Times = Callable[[float, float, np.random.Generator], NDArray[np.float64]]  # rate, duration, random -> sorted seconds


@dataclass(frozen=True)
class Arrival:
    """A request and the number of tokens after which its answer ends, which no policy sees."""

    job: Job
    length: int


@dataclass(frozen=True)
class Lengths:
    """Log-normal token counts: medians, spread (standard deviation of the log), and bounds."""

    prompt: float = 96.0
    output: float = 48.0
    spread: float = 0.7
    longest: int = 1024
    long_share: float = 0.0  # of prompts that are `longest`
    ending: float = 0.75  # mean share of the allowed output that is generated

    def draw(self, n: int, random: np.random.Generator) -> NDArray[np.int64]:
        """[n, 3]: prompt, most output, generated."""
        prompt = np.clip(random.lognormal(np.log(self.prompt), self.spread, n), 4, self.longest)
        prompt = np.where(random.random(n) < self.long_share, self.longest, prompt)
        length = np.clip(random.lognormal(np.log(self.output), self.spread, n), 1, self.longest)
        output = np.minimum(length / random.uniform(2 * self.ending - 1, 1, n), self.longest)
        return np.maximum(np.stack([prompt, np.maximum(output, length), length], axis=1).astype(np.int64), 1)


def poisson(rate: float, duration: float, random: np.random.Generator) -> NDArray[np.float64]:
    """Requests independent of each other."""
    return gamma(rate, duration, random, 1.0)


def gamma(rate: float, duration: float, random: np.random.Generator, shape: float = 0.25) -> NDArray[np.float64]:
    """Bursts: gaps of gamma distribution; shape 1 is Poisson, smaller is burstier."""
    times = np.zeros(0)
    while not len(times) or times[-1] < duration:
        gaps = random.gamma(shape, 1 / (rate * shape), int(rate * duration) + 64)
        times = np.concatenate([times, (times[-1] if len(times) else 0.0) + gaps.cumsum()])
    return times[times < duration]


def day(rate: float, duration: float, random: np.random.Generator) -> NDArray[np.float64]:
    """A day: half a sine around the mean rate, and a step to three times the curve in PEAK. `rate` is the mean over the duration."""
    grid = (np.arange(1000) + 0.5) / 1000
    shape = 1 - 0.5 * np.cos(2 * np.pi * grid)
    shape = np.where((grid >= PEAK[0]) & (grid < PEAK[1]), 3 * shape, shape)
    shape /= shape.mean()
    times = poisson(rate * shape.max(), duration, random)
    keep = random.random(len(times)) * shape.max() < shape[(times / duration * 1000).astype(int)]
    kept: NDArray[np.float64] = times[keep]
    return kept


TIMES: dict[str, tuple[Times, Lengths]] = {
    "chat": (poisson, Lengths()),
    "burst": (gamma, Lengths()),
    "classes": (day, Lengths()),
    "longtail": (poisson, Lengths(long_share=0.01)),
}


class Drawn(TypedDict, total=False):
    """What is drawn for each request.

    mix: share of each class, default 20/50/30. spread: standard deviation, as a share of the levels, of floors drawn around the middle
    of the ladder, as the paper's code does; 0 keeps the classes' floors.
    """

    mix: Mapping[str, float] | None
    spread: float


def generate(
    name: str,
    rate: float,
    duration: float,
    classes: Mapping[str, RequestClass],
    ladder: Ladder,
    seed: int = 0,
    **drawn: Unpack[Drawn],
) -> list[Arrival]:
    """The arrivals of a named workload: requests per second, seconds. Same arguments, same arrivals. UsageError lists the names."""
    spread = drawn.get("spread", 0.0)
    if name not in TIMES:
        raise UsageError(f"unknown workload '{name}'", f"choose one of: {', '.join(TIMES)}")
    if not (0 < rate * duration <= 1e7):
        raise UsageError(
            f"{rate:g} requests/s for {duration:g} s", "give a positive rate and duration, at most ten million requests"
        )
    random = np.random.default_rng([seed, *name.encode()])
    draw, lengths = TIMES[name]
    times = draw(rate, duration, random)
    shares = dict(drawn.get("mix") or MIX)
    missing = [c for c in shares if c not in classes]
    if missing:
        raise UsageError(f"no class '{missing[0]}'", f"choose from: {', '.join(classes)}")
    weights = np.array(list(shares.values()))
    kinds = random.choice(len(shares), len(times), p=weights / weights.sum())
    sizes = lengths.draw(len(times), random)
    floors = np.clip(np.rint(random.normal(ladder.top / 2, spread * len(ladder), len(times))), 0, ladder.top).astype(int)
    arrivals = []
    for i, (time, kind, (prompt, output, length)) in enumerate(zip(times.tolist(), kinds, sizes.tolist(), strict=True)):
        job = classes[list(shares)[kind]].job(f"{i:06d}", round(time, 6), prompt, output, ladder)
        if spread:
            job = replace(job, floor=int(floors[i]), ceiling=ladder.top)
        arrivals.append(Arrival(job, length))
    return arrivals


def write_trace(path: Path, arrivals: Iterable[Arrival], ladder: Ladder) -> None:
    """JSON lines in order of arrival."""
    lines = [
        {
            "arrival": a.job.arrival,
            "class": a.job.kind,
            "prompt": a.job.prompt,
            "output": a.job.output,
            "length": a.length,
            "floor": ladder.levels[a.job.floor].quality,
        }
        for a in arrivals
    ]
    replace_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


@dataclass(frozen=True)
class Recorded:
    """One line of a trace. floor: a quality, None for the class's; place: file and line, for errors."""

    place: str
    id: str
    arrival: float
    kind: str
    prompt: int
    output: int
    length: int
    floor: float | None

    def of(self, classes: Mapping[str, RequestClass], ladder: Ladder) -> Arrival:
        """As a request of its class. UsageError if there is none of that name."""
        if self.kind not in classes:
            raise UsageError(f"{self.place}: no class '{self.kind}'", f"choose from: {', '.join(classes)}")
        job = classes[self.kind].job(self.id, self.arrival, self.prompt, self.output, ladder)
        if self.floor is not None:
            job = replace(job, floor=ladder.at_least(self.floor), ceiling=max(job.ceiling, ladder.at_least(self.floor)))
        return Arrival(job, self.length)


def read_trace(path: Path) -> list[Recorded]:
    """At least one line, in order of arrival. UsageError names the line that is wrong."""
    try:
        lines = read_bounded(path, MOST_BYTES).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"cannot read {path}: {e}", "give a file of JSON lines") from e
    recorded = [_line(line, f"{path}:{i + 1}", i) for i, line in enumerate(lines) if line.strip()]
    if not recorded:
        raise UsageError(f"{path} has no requests", "give a trace with some")
    return sorted(recorded, key=lambda r: (r.arrival, r.id))


def _line(text: str, place: str, i: int) -> Recorded:
    next_step = "see docs/reference/files.md for the fields"
    try:
        line = check(RequestLine, decode(text.encode(), place, next_step), place, next_step)
    except CorruptError as e:
        raise UsageError(e.cause, next_step) from e
    length = line.output if line.length is None else line.length
    if length > line.output:
        raise UsageError(f"{place}: 'length' is more than 'output'", "give at most that")
    return Recorded(place, f"{i:06d}", line.arrival, line.class_, line.prompt, line.output, length, line.floor)
