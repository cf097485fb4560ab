"""Which prompts advance in a step of the elastic policy, and by how many tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..forecast.step_cost import CostModel, chunk_pairs
from .backlog import Backlog, Lane, still_waiting
from .base import Job, Ladder, Progress
from .fill import ceiling

Floats = NDArray[np.float64]

EARLY = 0.2  # share of the time left in which waiting requests are to be started: who plans to be just in time is late
URGENT = 0.5  # the same for the first class: for its sake decodes that can wait are left out
STARTS = 64  # most requests admitted in one step, so that a step's planning is bounded
LEAST_CHUNK = 16  # prompt tokens: less is not worth its place, unless the prompt ends
AFRESH = 0.1  # seconds after which the needs of a long backlog are computed anew
RESERVED = 0.125  # share of the places, once a request with a time to first token was seen
MEMORY = 16384  # prompt tokens over which shares are measured


Begun = tuple[float, Progress]  # a prompt partly computed, after the moment by which it must go on


class Chunk(NamedTuple):
    """Prompt tokens of one request in this step."""

    progress: Progress
    tokens: int


@dataclass
class Room:
    """What is left of the step while prompts are taken in. Seconds are the cost model's before correction."""

    seconds: float  # the step may last, by the clock
    tokens: int
    places: int
    reserved: int  # of the places, for who has a time to first token to meet
    cache: int
    used: float  # seconds of the decodes at their floors
    floors: float  # seconds left if everyone is served at the floor
    ceilings: float  # the same at the ceiling
    unread: float  # log share of sub-experts that the decodes, at their floors, do not read
    correction: float  # of the cost model, near this step
    must: bool  # take a chunk whether there is time or not
    needed: float = 0.0  # prompt tokens that deadlines ask for in this step
    release: float = math.inf  # seconds the step may last so that places are free in time
    chunks: list[Chunk] = field(default_factory=list)


class Option(NamedTuple):
    """A request whose turn it may be; the smallest is next."""

    rank: int  # 0: its class, or the late ones, had less than their share; 1: can meet its target; 2: cannot
    priority: int
    due: float
    id: str
    late: bool
    waits: bool
    patient: bool  # has no time to first token to meet
    lane: Lane
    progress: Progress


class Prompts:
    """The waiting requests, and what was served to whom."""

    def __init__(self, ladder: Ladder, cost: CostModel, patience: float, share: float) -> None:
        self.ladder, self.cost, self.patience, self.share = ladder, cost, patience, share
        self.backlog = Backlog(self._start_by)
        self.tightest = math.inf  # time to first token, relaxed by 1 % at each arrival
        self.least = 0  # level below which nobody is served now, whatever the floor
        self.advanced = 0.0  # when a prompt last did
        self._served: dict[Lane | None, float] = {}  # prompt tokens by lane, None: the late ones; fading
        self._read = (-math.inf, -1, 0.0, math.inf, False)  # when and what `_pace` last read from the backlog
        self._begun: dict[str, tuple[int, float]] = {}  # prompt tokens computed, and when the prompt must go on
        self._short: set[Lane | None] = set()  # those that have had less than their share, at this step

    def plan(self, now: float, begun: Sequence[Begun], remaining: Floats, waiting: Sequence[Progress], room: Room) -> None:
        """Fill `room.chunks`. remaining: tokens that each running request may still generate."""
        if not begun and not waiting:
            return
        strict = self._pace(now, begun, remaining, room)
        options = self._options(now, begun, strict)
        for _ in range(STARTS):
            best = min(
                (o for o in options if not o.waits or room.places > (room.reserved if o.patient and o.rank else 0)), default=None
            )
            if best is None:
                return
            tokens = self._fit(best.progress, room, capped=best.rank == 0 and len(options) > 1)
            if not tokens:
                return
            if best.waits and not self._admit(best, room, waiting):
                options = [o for o in options if not o.waits] + self._all_heads(now, strict)
                continue
            options.remove(best)
            if best.waits:
                options += self._heads(now, best.lane, strict, best.late)
            self._take(best, tokens, room)
            self.advanced = now

    # -- when

    def _start_by(self, progress: Progress) -> float:
        """When a prompt's computation must start; without a target, when it should. Called once per request."""
        job = progress.job
        if job.ttft is None:
            return job.arrival + self.patience
        alone = self._alone(progress)
        self.tightest = min(self.tightest * 1.01, max(job.ttft, 2 * alone))
        return job.arrival + job.ttft - alone

    def _alone(self, progress: Progress) -> float:
        """Seconds for the rest of a prompt, alone and at the floor, at most."""
        c, rest = self.cost.coefficients, progress.remaining_prompt
        each = self.token_seconds(progress.job.floor, 0.0)
        return float((c.step + rest * each + c.prefill_pair * chunk_pairs(rest, progress.computed)) * self.cost.everywhere)

    def begun(self, partial: Sequence[Progress]) -> list[Begun]:
        """`_start_by` for prompts that are partly computed, anew when they have advanced."""
        before, self._begun = self._begun, {}
        for p in partial:
            known = before.get(p.job.id)
            if known is None or known[0] != p.computed:
                wait = self.patience if p.job.ttft is None else p.job.ttft - self._alone(p)
                known = (p.computed, p.job.arrival + wait)
            self._begun[p.job.id] = known
        return [(due, p) for (_, due), p in zip(self._begun.values(), partial, strict=True)]

    def _pace(self, now: float, begun: Sequence[Begun], remaining: Floats, room: Room) -> bool:
        """Set what the deadlines need of this step. True if they cannot all be met even at the floors.

        A long backlog changes slowly: what it needs is computed anew when a thirty-second of it has changed, or after a while.
        """
        when, changes, pace, release, strict = self._read
        changed = self.backlog.changes - changes
        if now - when > AFRESH or changed > len(self.backlog) / 32:
            pace, strict = self._deadlines(now, begun, remaining, room)
            self._read = (now, self.backlog.changes, pace, room.release, strict)
        else:
            room.release = release
        late = self.backlog.late_tokens / (EARLY * self.patience)  # they have nothing to meet, but are not to grow old either
        room.needed = (pace + late) * room.seconds
        return strict

    def _deadlines(self, now: float, begun: Sequence[Begun], remaining: Floats, room: Room) -> tuple[float, bool]:
        """Prompt tokens per second that all deadlines need, and whether that is more than the floors allow."""
        timely = self.backlog.timely()
        short = self._release(timely[0] - now, timely[2], remaining, room)
        alone = self.token_seconds(self.least, room.unread) * room.correction
        slowed = alone * (room.used + max(room.floors, 1e-9)) / max(room.floors, 1e-9)
        first, pace = 0.0, 0.0  # prompts partly computed go first here; in truth by their deadlines
        for due, rest in sorted((due, p.remaining_prompt) for due, p in begun):
            first += rest
            pace = max(pace, first / (EARLY * max(due - now, 0.0) + alone * rest))
        if timely.shape[1]:
            left, tokens = timely[0] - now, timely[1]
            before = first + tokens.cumsum() - tokens
            pace = max(pace, float(((before + tokens) / (EARLY * left + alone * tokens)).max()))
            short = short or bool((before * slowed > left).any())
        return pace, short

    def _release(self, left: Floats, promised: Floats, remaining: Floats, room: Room) -> bool:
        """Set how long a step may last so that requests finish, and free their places, in time. True if the floors are too slow."""
        late = min(self.backlog.late, len(remaining))
        first = room.places + len(remaining)
        left, promised = left[:first], promised[:first]
        fits = min(room.places, int(np.searchsorted(promised.cumsum(), room.cache, side="right")))
        if not len(remaining) or len(left) + late <= fits:
            return False
        if late:
            left = np.concatenate([left, np.full(late, self.patience)])
        left = left[fits : fits + len(remaining)]
        steps = np.sort(remaining)[: len(left)]
        room.release = max(EARLY * float((left / steps).min()), 1e-6)
        return room.release < EARLY * room.used * room.correction

    def urgent(self, now: float, begun: Sequence[Begun]) -> float:
        """Share of the coming time that prompts of the first class with something to meet need, at their floors; before correction."""
        timely = [(due, p) for due, p in begun if p.job.ttft is not None and due >= now]
        queues = [(lane[0], q) for lane, q in self.backlog.lanes.items() if q.timely and q.timely[0][2].job.ttft is not None]
        first = min([p.job.priority for _, p in timely] + [priority for priority, _ in queues], default=None)
        if first is None:
            return 0.0
        columns = [queue.columns()[:2, :STARTS] for priority, queue in queues if priority == first]
        own = [(due, p.remaining_prompt) for due, p in timely if p.job.priority == first]
        due, tokens = np.concatenate([np.array(own, dtype=np.float64).reshape(-1, 2).T, *columns], axis=1)
        order = due.argsort()
        work = tokens[order].cumsum() * self.token_seconds(self.least, 0.0)
        return float((work / (URGENT * (due[order] - now) + work)).max())

    # -- who

    def _options(self, now: float, begun: Sequence[Begun], strict: bool) -> list[Option]:
        """Prompts partly computed, and the heads of every lane."""
        least = self.share * sum(self._served.values())
        self._short = {key for key in (*self.backlog.lanes, *self._served, None) if self._served.get(key, 0.0) < least}
        options = []
        for due, p in begun:
            lane, late = (p.job.priority, p.job.kind), due < now
            options.append(self._option(lane, late, self._again(p, now) if late else due, p, strict, waits=False))
        return options + self._all_heads(now, strict)

    def _all_heads(self, now: float, strict: bool) -> list[Option]:
        return [o for lane in self.backlog.lanes for late in (False, True) for o in self._heads(now, lane, strict, late)]

    def _heads(self, now: float, lane: Lane, strict: bool, late: bool) -> list[Option]:
        queue = self.backlog.lanes[lane].late if late else self.backlog.lanes[lane].timely
        if not queue:
            return []
        start, _, first = queue[0]
        return [self._option(lane, late, self._again(first, now) if late else start, first, strict, waits=True)]

    def _again(self, progress: Progress, now: float) -> float:
        """Late ones in the order of what they have waited in units of their targets: nobody is passed by for ever."""
        job = progress.job
        return now - (now - job.arrival) * self.patience / (self.patience if job.ttft is None else max(job.ttft, 1e-3))

    def _option(self, lane: Lane, late: bool, due: float, progress: Progress, strict: bool, waits: bool) -> Option:
        short = lane in self._short or (late and None in self._short)
        rank, patient = 0 if short else 2 if late else 1, late or progress.job.ttft is None
        return Option(rank, lane[0] if strict and rank == 1 else 0, due, progress.job.id, late, waits, patient, lane, progress)

    def _admit(self, option: Option, room: Room, waiting: Sequence[Progress]) -> bool:
        """Take a waiting request out of the backlog. False if it is not there any more, or if the cache has no room for it."""
        if not still_waiting(option.progress, waiting):
            self.backlog.rebuild(waiting)
            return False
        promised = option.progress.job.prompt + option.progress.job.output
        if promised > room.cache:  # nobody passes it: a long request would wait for ever
            room.places = 0
            return False
        self.backlog.take(option.lane, option.late)
        room.places -= 1
        room.cache -= promised
        return True

    # -- how much

    def floor(self, job: Job) -> int:
        """The lowest level at which this request may be served now."""
        return min(max(job.floor, self.least), ceiling(job, self.ladder))

    def _fit(self, progress: Progress, room: Room, capped: bool) -> int:
        """Prompt tokens of this request that the step can take: all that fit at the ceiling, as many as are needed at the floor."""
        rest, job = min(progress.remaining_prompt, room.tokens), progress.job
        pair = self.cost.coefficients.prefill_pair * (progress.computed + rest / 2)
        floor = room.floors / (self.token_seconds(self.floor(job), room.unread) + pair + 1e-12)
        top = room.ceilings / (self.token_seconds(ceiling(job, self.ladder), room.unread) + pair + 1e-12)
        tokens = max(top, min(floor, room.needed))
        if capped:
            tokens = min(tokens, max(LEAST_CHUNK, 2 * self.share * floor))
        if tokens < min(LEAST_CHUNK, rest):
            return min(LEAST_CHUNK, rest) if room.must and not room.chunks else 0
        return min(int(tokens), rest)

    def token_seconds(self, level: int, unread: float) -> float:
        """Seconds that one more prompt token at this level adds to a step, attention aside."""
        c, slots = self.cost.coefficients, self.ladder.levels[level].slots
        return c.prefill_token + c.prefill_slot * slots + c.block * slots * math.exp(unread)

    def _take(self, option: Option, tokens: int, room: Room) -> None:
        """Spend the step's room, and remember who was served; old counts fade, and lanes without any are forgotten."""
        progress, job = option.progress, option.progress.job
        pairs = self.cost.coefficients.prefill_pair * chunk_pairs(tokens, progress.computed)
        room.chunks.append(Chunk(progress, tokens))
        room.floors -= tokens * self.token_seconds(self.floor(job), room.unread) + pairs
        room.ceilings -= tokens * self.token_seconds(ceiling(job, self.ladder), room.unread) + pairs
        room.needed -= tokens
        room.tokens -= tokens
        for key in (option.lane, None) if option.late else (option.lane,):
            self._served[key] = self._served.get(key, 0.0) + tokens
        if sum(self._served.values()) > MEMORY:
            self._served = {key: n / 2 for key, n in self._served.items() if n >= 1}
