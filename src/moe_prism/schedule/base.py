"""What a policy sees and what it answers. Plain data: no engine, no clock, no tensors.

Times are seconds on one monotonic clock that the caller reads; token counts are whole numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..errors import UsageError
from ..point import OperatingPoint


@dataclass(frozen=True)
class Level:
    """A quality level: an operating point that may be served, under its name."""

    name: str
    point: OperatingPoint
    slots: float  # mean kept slots per token and layer, K
    quality: float  # share of held-out tokens whose most likely successor is the full model's, 0..1

    def to_json(self) -> dict[str, Any]:
        """As `/v1/models` and `ladder.json` have it."""
        return {"name": self.name, "point": self.point.to_json(), "slots": self.slots, "quality": self.quality}


@dataclass(frozen=True)
class Ladder:
    """The levels of one model from cheapest to full; both K and quality rise strictly. The last one is the full model, quality 1."""

    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        pairs = list(pairwise(self.levels))
        if (
            not self.levels
            or not self.levels[-1].point.is_full
            or any(a.slots >= b.slots or a.quality >= b.quality for a, b in pairs)
        ):
            raise UsageError(
                "levels must rise in slots and quality and end with the full model", "measure them with `moe-prism frontier`"
            )

    def __len__(self) -> int:
        return len(self.levels)

    @property
    def top(self) -> int:
        return len(self.levels) - 1

    def at_least(self, quality: float) -> int:
        """The cheapest level of at least this quality; the top for anything above."""
        return min(bisect_left([level.quality for level in self.levels], quality), self.top)

    def mean(self, tokens: Mapping[int, int]) -> tuple[float, float]:
        """(quality, slots) per token, of how many tokens were computed at which level; 0 of none."""
        total = sum(tokens.values()) or 1
        at = [(self.levels[i], n) for i, n in tokens.items()]
        return sum(level.quality * n for level, n in at) / total, sum(level.slots * n for level, n in at) / total

    def named(self, name: str) -> int:
        """The level of that name; UsageError lists the names."""
        for i, level in enumerate(self.levels):
            if level.name == name:
                return i
        raise UsageError(f"no operating point '{name}'", f"choose one of: {', '.join(level.name for level in self.levels)}")


@dataclass(frozen=True)
class Job:
    """One request, as fixed at its arrival."""

    id: str
    arrival: float
    prompt: int  # tokens
    output: int  # most tokens it may generate
    floor: int = 0  # level it may not be served below
    ceiling: int = -1  # level it need not be served above; -1 is the top
    ttft: float | None = None  # seconds to the first token
    tpot: float | None = None  # seconds per further token
    priority: int = 0  # smaller first
    kind: str = "default"  # class name, for queues and reports


@dataclass(frozen=True)
class Progress:
    """A request and how far it is. Waiting: nothing computed yet. Running: it holds cache memory."""

    job: Job
    computed: int = 0  # prompt tokens already in the cache
    generated: int = 0
    first_token: float | None = None
    level: int | None = None  # level of its last step

    @property
    def remaining_prompt(self) -> int:
        return self.job.prompt - self.computed

    @property
    def context(self) -> int:
        return self.computed + self.generated


@dataclass(frozen=True)
class Limits:
    """What the engine can take in one step."""

    requests: int = 256  # running at once, B_max of the paper
    tokens: int = 2048  # tokens of one step, prefill and decode together
    free_cache: int = 1 << 30  # cache tokens not yet promised to a running request


@dataclass(frozen=True)
class Work:
    """One request's part of a step: `tokens` prompt tokens, or one decode token, at a level."""

    id: str
    tokens: int
    level: int


class Policy(ABC):
    """Chooses who runs in the next step, with how many tokens, at which level.

    A policy may remember what it saw, but reads no clock and draws no random numbers: the same calls give the same answers.
    """

    @abstractmethod
    def step(self, now: float, waiting: Sequence[Progress], running: Sequence[Progress], limits: Limits) -> list[Work]:
        """waiting in order of arrival; running in order of admission. A waiting request that gets work is admitted.

        Every answer keeps floor <= level <= ceiling, at most `remaining_prompt` tokens for a request in prefill and 1 in decode,
        and the limits. Not empty when anything can run, unless the policy waits on purpose and says until when by `wake`.
        """

    def wake(self, now: float) -> float | None:
        """When an idle policy wants to be asked again though nothing arrived; None if never."""
        return None
