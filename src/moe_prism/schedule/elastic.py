"""Our policy: mixed batches, every request at its own level, chosen at each step. Deadlines first, then quality.

1. *Time.* The step may last as long as the decodes in it can wait for their next token: the target per token, plus a part of what a
   request is ahead of its schedule, minus a part of what it is behind. It is also kept short beside the tightest time to first token.
2. *Decodes.* All of them, at their floors. If that alone is too long, those that can wait longest are left out of this step.
3. *Prompts.* In the order in which they must start. As many tokens as fit with everyone at the ceiling; more, at the price of
   quality, only if deadlines need the pace. If not all deadlines can be met even at the floors, by priority.
4. *Quality.* What time is left lifts the lowest levels first (`levels.lift`).

Who can no longer meet the target is served after those who can, by arrival, but `share` of the prompt tokens goes to them and to every
class that has requests waiting, and a running request without a token for `stall` seconds goes first. So everyone advances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .backlog import Backlog, Lane, still_waiting
from .base import Ladder, Limits, Policy, Progress, Work
from .cost import CostModel, Totals, chunk_pairs
from .fill import ceiling
from .levels import Parts, Prices, lift
from .running import CEILING, DONE, FIRST, FLOOR, LAST, OUTPUT, PROMPT, TPOT, Running

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MARGIN = 0.92  # share of a step's time that is planned: predictions err
HORIZON = 8  # tokens over which a request ahead of or behind its schedule returns to it
RESPONSE = 0.35  # longest step as a share of the tightest time to first token
LONGEST = 0.5  # seconds of a step when no target says anything
STARTS = 64  # most requests admitted in one step, so that a step's planning is bounded
LEAST_CHUNK = 16  # prompt tokens: less is not worth its place, unless the prompt ends
MEMORY = 16384  # prompt tokens over which shares are measured


@dataclass
class Chunk:
    """Prompt tokens of one request in this step."""

    progress: Progress
    tokens: int


@dataclass
class Room:
    """What is left of the step while prompts are taken in. Seconds are the cost model's before correction."""

    tokens: int
    places: int
    cache: int
    used: float  # seconds of the decodes at their floors
    floors: float  # seconds left if everyone is served at the floor
    ceilings: float  # the same at the ceiling
    unread: float  # log share of sub-experts that the decodes, at their floors, do not read
    correction: float  # of the cost model, near this step
    must: bool  # take a chunk whether there is time or not
    needed: float = 0.0  # prompt tokens that deadlines ask for in this step
    release: float = math.inf  # seconds the step may take so that places are free in time
    chunks: list[Chunk] = field(default_factory=list)


@dataclass(frozen=True, order=True)
class Option:
    """A request whose turn it may be; the smallest is next."""

    rank: int  # 0: its class, or the late ones, had less than their share; 1: can meet its target; 2: cannot
    priority: int
    due: float
    id: str
    progress: Progress = field(compare=False)
    lane: Lane = field(compare=False)
    late: bool = field(compare=False)
    waits: bool = field(compare=False)


class Elastic(Policy):
    """Deadlines first, then quality; nobody below the floor, nobody forgotten."""

    def __init__(
        self,
        ladder: Ladder,
        cost: CostModel,
        quality: float = 0.0,
        patience: float = 10.0,
        share: float = 0.08,
        stall: float = 1.0,
    ) -> None:
        """quality: least mean quality over served tokens; deadlines give way to it.

        patience: seconds in which requests without a target should start. share: part of the prompt tokens kept for each class, and for
        those that are late. stall: seconds without a token after which a running request goes first.
        """
        self.ladder, self.cost, self.quality = ladder, cost, quality
        self.patience, self.share, self.stall = patience, share, stall
        self._prices = Prices(ladder, cost.facts)
        self._backlog = Backlog(self._start_by)
        self._running = Running(ladder)
        self._tightest = math.inf  # time to first token, relaxed by 1 % at each arrival
        self._served: dict[Lane | None, float] = {}  # prompt tokens by lane, None: the late ones; fading
        self._mean = 1.0  # quality served, fading
        self._last_prompt = 0.0  # when a prompt last advanced

    # -- the step

    def step(self, now: float, waiting: Sequence[Progress], running: Sequence[Progress], limits: Limits) -> list[Work]:
        self._backlog.sync(waiting, now)
        rows = self._running.sync(running, now)
        decoding = np.array([p.computed >= p.job.prompt for p in running], dtype=bool)
        prompts = [p for p, d in zip(running, decoding.tolist(), strict=True) if not d]
        rows = rows[decoding]
        kept, seconds = self._decodes(now, rows, limits)
        room = self._room(kept, seconds, limits, len(running))
        room.must = not len(kept) or now - self._last_prompt > self.stall
        strict = self._pace(now, prompts, room, seconds, rows)
        self._prompts(now, prompts, room, strict, waiting)
        return self._works(now, kept, room.chunks, min(seconds, room.release))

    def _works(self, now: float, rows: Ints, chunks: list[Chunk], seconds: float) -> list[Work]:
        parts = self._parts(rows, chunks)
        least = self.quality if self._mean < self.quality else 0.0
        levels = lift(parts, seconds * MARGIN, least, self.cost, self._prices)
        works = self._running.decode_work(rows, levels[: len(rows)])
        works += [
            Work(c.progress.job.id, c.tokens, int(level)) for c, level in zip(chunks, levels[len(rows) :].tolist(), strict=True)
        ]
        self._running.table[rows, LAST] = now
        weight = float(parts.tokens.sum())
        if weight:
            served = float((parts.tokens * self._prices.quality[levels]).sum()) / weight
            self._mean += (served - self._mean) * min(weight / MEMORY, 1.0)
        return works

    def _parts(self, rows: Ints, chunks: list[Chunk]) -> Parts:
        table = self._running.table
        jobs = [c.progress.job for c in chunks]
        floor, top = table[rows, FLOOR].astype(np.int64), table[rows, CEILING].astype(np.int64)
        return Parts(
            tokens=np.concatenate([np.ones(len(rows)), [c.tokens for c in chunks]]),
            floor=np.concatenate([floor, np.array([j.floor for j in jobs], dtype=np.int64)]),
            ceiling=np.concatenate([top, np.array([ceiling(j, self.ladder) for j in jobs], dtype=np.int64)]),
            decodes=len(rows),
            prefill_pairs=float(sum(chunk_pairs(c.tokens, c.progress.computed) for c in chunks)),
            decode_pairs=float(table[rows, PROMPT].sum() + table[rows, DONE].sum()),
        )

    # -- decodes

    def _decodes(self, now: float, rows: Ints, limits: Limits) -> tuple[Ints, float]:
        """Who decodes in this step, and how many seconds it may take."""
        longest = min(LONGEST, RESPONSE * self._tightest)
        if not len(rows):
            return rows, longest
        allowance = self._allowance(now, rows)
        seconds = max(min(longest, float(allowance.min())), 1e-6)
        parts = self._parts(rows, [])
        floors = parts.totals(parts.floor, self._prices)
        planned = seconds * MARGIN / self.cost.correction(floors)
        if len(rows) <= limits.tokens and self.cost.base(floors) <= planned:
            return rows, seconds
        return self._most_urgent(now, rows, allowance, planned, limits), seconds

    def _allowance(self, now: float, rows: Ints) -> Floats:
        """Seconds that each decode can wait for its next token and still be on schedule HORIZON tokens later; infinite without a target."""
        tpot, first, done, output = self._running.table[rows][:, (TPOT, FIRST, DONE, OUTPUT)].T
        with np.errstate(invalid="ignore"):
            ahead = first + tpot * (done - 1) - now
            lost = (ahead < 0) & (ahead + (tpot - self._fastest()) * (output - done) < 0)
            allowance = np.maximum(tpot + ahead / HORIZON, tpot / 4)
        return np.where(np.isinf(tpot) | lost, np.inf, allowance)

    def _fastest(self) -> float:
        """Seconds of the shortest step there is."""
        return self.cost.coefficients.step

    def _most_urgent(self, now: float, rows: Ints, allowance: Floats, planned: float, limits: Limits) -> Ints:
        """The longest prefix, most urgent first, that fits the step at the floors. Who had no token for `stall` seconds comes first."""
        table = self._running.table
        last = table[rows, LAST]
        order = np.lexsort((last, allowance))
        stalled = order[now - last[order] > self.stall]
        order = np.concatenate([stalled[: 1 + len(rows) // 8], order])
        order = order[np.sort(np.unique(order, return_index=True)[1])]
        sums = self._prefix(rows[order])
        fits = int(np.searchsorted(self.cost.base(sums), planned, side="right"))
        return rows[np.sort(order[: min(max(fits, 1), limits.tokens)])]

    def _prefix(self, rows: Ints) -> Totals:
        """The sums of the first 1, 2, ... of these decodes at their floors."""
        floor = self._running.table[rows, FLOOR].astype(np.int64)
        return Totals(
            decode=np.arange(1.0, len(rows) + 1),
            decode_slots=self._prices.slots[floor].cumsum(),
            decode_pairs=(self._running.table[rows, PROMPT] + self._running.table[rows, DONE]).cumsum(),
            unread=self._prices.unread[floor].cumsum(),
        )

    # -- prompts

    def _start_by(self, progress: Progress) -> float:
        """When a prompt's computation must start; without a target, when it should. Called once per request."""
        job = progress.job
        if job.ttft is None:
            return job.arrival + self.patience
        alone = self._alone(progress)
        self._tightest = min(self._tightest * 1.01, max(job.ttft, 2 * alone))
        return job.arrival + job.ttft - alone

    def _alone(self, progress: Progress) -> float:
        """Seconds for the rest of a prompt, alone and at the floor."""
        slots = self.ladder.levels[progress.job.floor].slots
        return self.cost.prefill(progress.remaining_prompt, slots, progress.computed)

    def _due(self, progress: Progress) -> float:
        """`_start_by` for a prompt that is partly computed."""
        job = progress.job
        return job.arrival + (self.patience if job.ttft is None else job.ttft - self._alone(progress))

    def _room(self, decodes: Ints, seconds: float, limits: Limits, running: int) -> Room:
        """After these decodes, in a step of this many seconds."""
        parts = self._parts(decodes, [])
        floors, ceilings = parts.totals(parts.floor, self._prices), parts.totals(parts.ceiling, self._prices)
        correction = self.cost.correction(floors)
        planned, used = seconds * MARGIN / correction, float(self.cost.base(floors))
        return Room(
            tokens=limits.tokens - len(decodes),
            places=limits.requests - running,
            cache=limits.free_cache,
            used=used,
            floors=planned - used,
            ceilings=planned - float(self.cost.base(ceilings)),
            unread=floors.unread,
            correction=correction,
            must=False,
        )

    def _pace(self, now: float, prompts: list[Progress], room: Room, seconds: float, rows: Ints) -> bool:
        """Set what the deadlines need of this step. True if they cannot all be met even at the floors."""
        timely = self._backlog.timely()
        late = self._backlog.late_tokens / self.patience  # the late ones have nothing to meet, but are not to grow old either
        room.needed = late * seconds
        short = self._release(timely[0] - now, timely[2], room, rows)
        if prompts:
            partial = np.array([(self._due(p), p.remaining_prompt, 0.0) for p in prompts]).T
            timely = np.concatenate([partial, timely], axis=1)
            timely = timely[:, np.argsort(timely[0], kind="stable")]
        if not timely.shape[1]:
            return short
        left, tokens = np.maximum(timely[0] - now, 0.0), timely[1]
        upto = tokens.cumsum()
        alone = self._token_seconds(0, room.unread) * room.correction
        room.needed += float(np.max(upto / (left + tokens * alone))) * seconds
        slowed = alone * (room.used + max(room.floors, 1e-9)) / max(room.floors, 1e-9)
        return short or bool(((upto - tokens) * slowed > left).any())

    def _release(self, left: Floats, promised: Floats, room: Room, rows: Ints) -> bool:
        """Set how long a step may take so that requests finish, and free their places, in time. True if the floors are too slow."""
        late = self._backlog.late
        fits = min(room.places, int(np.searchsorted(promised.cumsum(), room.cache, side="right")))
        left = np.concatenate([left[fits:], np.full(min(late, len(rows)), self.patience)])
        if not len(left) or not len(rows):
            return False
        table = self._running.table
        steps = np.sort(np.maximum(table[rows, OUTPUT] * self._running.used - table[rows, DONE], 1.0))
        n = min(len(left), len(steps))
        room.release = max(float((left[:n] / steps[:n]).min()), 1e-6)
        return room.release < room.used * room.correction

    def _token_seconds(self, level: int, unread: float) -> float:
        """Seconds that one more prompt token at this level adds to a step, attention aside."""
        c, slots = self.cost.coefficients, self.ladder.levels[level].slots
        return c.prefill_token + c.prefill_slot * slots + c.block * slots * math.exp(unread)

    def _prompts(self, now: float, prompts: list[Progress], room: Room, strict: bool, waiting: Sequence[Progress]) -> None:
        """Take in prompts, most urgent first, until tokens, time, places or cache end."""
        partial = [(self._due(p), p) for p in prompts]
        for _ in range(STARTS):
            options = self._options(now, partial, room, strict)
            if not options:
                return
            best = min(options)
            progress = best.progress
            tokens = self._fit(progress, room, capped=best.rank == 0 and len(options) > 1)
            if not tokens:
                return
            if best.waits and not self._admit(best, room, waiting):
                continue
            partial = [(due, p) for due, p in partial if p is not progress]
            room.chunks.append(Chunk(progress, tokens))
            self._spend(progress, tokens, room)
            self._count(best, tokens)
            self._last_prompt = now

    def _options(self, now: float, partial: list[tuple[float, Progress]], room: Room, strict: bool) -> list[Option]:
        """Whose turn it may be: prompts partly computed, and the heads of every lane if a place is free."""
        options = []
        for due, p in partial:
            lane = (p.job.priority, p.job.kind)
            options.append(self._option(lane, due < now, due, p, strict, False))
        if room.places > 0:
            for lane, queue in self._backlog.lanes.items():
                if queue.timely:
                    options.append(self._option(lane, False, queue.timely[0][0], queue.timely[0][2], strict, True))
                if queue.late:
                    options.append(self._option(lane, True, queue.late[0][0], queue.late[0][2], strict, True))
        return options

    def _option(self, lane: Lane, late: bool, due: float, progress: Progress, strict: bool, waits: bool) -> Option:
        short = self._short(lane) or (late and self._short(None))
        rank = 0 if short else 2 if late else 1
        return Option(rank, lane[0] if strict and rank == 1 else 0, due, progress.job.id, progress, lane, late, waits)

    def _short(self, lane: Lane | None) -> bool:
        """Has it had less than its share?"""
        return self._served.get(lane, 0.0) < self.share * sum(self._served.values())

    def _admit(self, option: Option, room: Room, waiting: Sequence[Progress]) -> bool:
        """Take a waiting request out of the backlog. False if it is not there any more, or if the cache has no room for it."""
        if not still_waiting(option.progress, waiting):
            self._backlog.rebuild(waiting)
            return False
        promised = option.progress.job.prompt + option.progress.job.output
        if promised > room.cache:  # nobody passes it: a long request would wait for ever
            room.places = 0
            return False
        self._backlog.take(option.lane, option.late)
        room.places -= 1
        room.cache -= promised
        return True

    def _fit(self, progress: Progress, room: Room, capped: bool) -> int:
        """Prompt tokens of this request that the step can take: all that fit at the ceiling, as many as are needed at the floor."""
        rest, job = min(progress.remaining_prompt, room.tokens), progress.job
        pair = self.cost.coefficients.prefill_pair * (progress.computed + rest / 2)
        floor = room.floors / (self._token_seconds(job.floor, room.unread) + pair + 1e-12)
        top = room.ceilings / (self._token_seconds(ceiling(job, self.ladder), room.unread) + pair + 1e-12)
        tokens = max(top, min(floor, room.needed))
        if capped:
            tokens = min(tokens, max(LEAST_CHUNK, 2 * self.share * floor))
        if tokens < min(LEAST_CHUNK, rest):
            return min(LEAST_CHUNK, rest) if room.must and not room.chunks else 0
        return min(int(tokens), rest)

    def _spend(self, progress: Progress, tokens: int, room: Room) -> None:
        job = progress.job
        pairs = self.cost.coefficients.prefill_pair * chunk_pairs(tokens, progress.computed)
        room.floors -= tokens * self._token_seconds(job.floor, room.unread) + pairs
        room.ceilings -= tokens * self._token_seconds(ceiling(job, self.ladder), room.unread) + pairs
        room.needed -= tokens
        room.tokens -= tokens

    def _count(self, option: Option, tokens: int) -> None:
        """Remember who was served; old counts fade, and lanes without any are forgotten."""
        for key in (option.lane, None) if option.late else (option.lane,):
            self._served[key] = self._served.get(key, 0.0) + tokens
        if sum(self._served.values()) > MEMORY:
            self._served = {key: n / 2 for key, n in self._served.items() if n >= 1}
