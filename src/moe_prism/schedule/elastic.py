"""Our policy: mixed batches, every request at its own level, chosen at each step. Deadlines first, then quality.

1. *Time.* The step may last as long as the decodes in it can wait for their next token: the target per token, plus a part of what a
   request is ahead of its schedule, minus a part of what it is behind. It is also kept short beside the tightest time to first token.
2. *Decodes.* All of them, at their floors. If that alone is too long, those that can wait longest are left out of this step, and also
   if a prompt of the first class would otherwise miss its target.
3. *Prompts.* In the order in which they must start. As many tokens as fit with everyone at the ceiling; more, at the price of
   quality, only if deadlines need the pace. If not all deadlines can be met even at the floors, by priority.
4. *Quality.* What time is left lifts the lowest levels first (`levels.lift`). Levels at which a percent of quality buys less than a
   percent of time are not used, whatever the floor: where time hardly depends on K, overload is no reason to lower it.

Who can no longer meet the target is served after those who can, by what they have waited in units of their target, but `share` of the
prompt tokens goes to them and to every class that has requests waiting, and a running request without a token for `stall` seconds goes
first. So everyone advances.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..forecast.step_cost import CostModel, Totals, chunk_pairs
from .base import Ladder, Limits, Policy, Progress, Work
from .fill import ceiling
from .levels import LevelPrices, Parts, lift, worthwhile
from .prompts import RESERVED, Begun, Chunk, Prompts, Room
from .running import DONE, END, LAST, OUTPUT, PROMPT, START, TPOT, Running

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MARGIN = 0.86  # share of a step's time that is planned: predictions err
HORIZON = 8  # tokens over which a request ahead of or behind its schedule returns to it
RESPONSE = 0.35  # longest step as a share of the tightest time to first token
LONGEST = 0.5  # seconds of a step when no target says anything
AFRESH = 0.2  # seconds after which levels are weighed anew
MEMORY = 1 << 16  # tokens over which the mean quality is kept


class ElasticPolicy(Policy):
    """Deadlines first, then quality; nobody below the floor, nobody forgotten."""

    # More than six parameters: the two that every policy has, then one for each setting that a user can give it by name.
    def __init__(
        self,
        ladder: Ladder,
        cost: CostModel,
        quality: float = 0.0,
        patience: float = 10.0,
        share: float = 0.08,
        stall: float = 1.0,
        worth: float = 1.0,
    ) -> None:
        """quality: least mean quality over served tokens: while the mean is below, nobody is served below this quality.

        patience: seconds in which requests without a target should start. share: part of the prompt tokens kept for each class, and for
        those that are late. stall: seconds without a token after which a running request goes first.
        worth: share of time that a share of quality must buy for a level to be used, whatever the floor; 0 allows all levels.
        """
        self.ladder, self.cost, self.quality, self.stall = ladder, cost, quality, stall
        self._least, self._worth = ladder.at_least(quality), worth
        self._decode_least = 0  # level below which no decode is served now
        self._weighed = -np.inf  # when levels were last weighed against their time
        self._worthy = (0, 0)  # lowest level worth its time, for decodes and for prompts
        self._prices = LevelPrices(ladder, cost.facts)
        self._prompts = Prompts(ladder, cost, patience, share)
        self._running = Running(ladder)
        self._usual = Totals()  # of the last step's prompts
        self._weight, self._mean = 0.0, 0.0  # tokens served and their mean quality, fading

    def step(self, now: float, waiting: Sequence[Progress], running: Sequence[Progress], limits: Limits) -> list[Work]:
        self._prompts.backlog.sync(waiting, now)
        rows = self._running.sync(running, now)
        # Only a request that has generated nothing can still have prompt left. The list of those is short, that of all requests is long.
        prompts = [i for i in self._running.silent if running[i].remaining_prompt > 0]
        begun = self._prompts.begun([running[i] for i in prompts])
        rows = np.delete(rows, prompts) if prompts else rows
        self._weigh(now, len(rows))
        room, rows, parts = self._decodes(now, rows, begun, limits, len(running))
        self._prompts.plan(now, begun, self._running.remaining(rows), waiting, room)
        return self._works(now, rows, self._with_chunks(parts, room.chunks), room)

    def _works(self, now: float, rows: Ints, parts: Parts, room: Room) -> list[Work]:
        """The step at the levels that its time allows."""
        if not len(parts.floor):
            return []
        levels = lift(parts, min(room.seconds, room.release) * MARGIN, self.cost, self._prices)
        # A running mean over the last MEMORY tokens: once so many were served, each token weighs 1 / MEMORY of the mean.
        self._weight = min(self._weight + parts.weight, MEMORY)
        self._mean += (parts.mean(self._prices.quality[levels]) - self._mean) * parts.weight / max(self._weight, parts.weight)
        self._running.table[rows, LAST] = now
        works = self._running.decode_work(rows, levels[: len(rows)])
        for chunk, level in zip(room.chunks, levels[len(rows) :].tolist(), strict=True):
            works.append(Work(chunk.progress.job.id, chunk.tokens, level))
        return works

    def _weigh(self, now: float, decodes: int) -> None:
        """Below which level nobody is served now."""
        if now - self._weighed > AFRESH:
            self._weighed = now
            slots, unread, quality = self._prices.slots, self._prices.unread, self._prices.quality
            # Levels are weighed on the batch as it is. Few decodes hardly share sub-experts, so a lower level saves reads; many read nearly
            # all of them at any level, and then giving up quality buys little.
            n = max(decodes, 1)
            step = self.cost.base(Totals(decode=float(n), decode_slots=n * slots, unread=n * unread))
            prompt = np.array([self._prompts.token_seconds(level, n * float(unread[-1])) for level in range(len(slots))])
            self._worthy = worthwhile(step, quality, self._worth), worthwhile(prompt, quality, self._worth)
        # The promise is about the mean: it is below after cheap tokens, and binds only until dear ones have made up for them.
        mandated = self._least if self._mean < self.quality else 0
        self._decode_least, self._prompts.least = (max(mandated, level) for level in self._worthy)

    # -- decodes

    def _decodes(self, now: float, rows: Ints, begun: Sequence[Begun], limits: Limits, running: int) -> tuple[Room, Ints, Parts]:
        """Who decodes in this step, and the room that leaves for prompts."""
        # A request that arrives while a step runs waits for its end, so no step may take much of the tightest time to first token.
        seconds = min(LONGEST, RESPONSE * self._prompts.tightest)
        parts = self._parts(rows)
        prompts = self._usual if begun or self._prompts.backlog else Totals()
        # Times are compared before correction: dividing the limit once is cheaper than correcting each of the many sums that are tried.
        # The correction is that of a step with prompts like the last one's, because this step's are not chosen yet.
        correction = self.cost.correction(parts.floors + prompts)
        if len(rows):
            allowance = self._allowance(now, rows)
            seconds = max(min(seconds, float(allowance.min())), 1e-6)
            planned = seconds * MARGIN / correction
            left = planned * (1 - self._prompts.urgent(now, begun))
            # `left` is what urgent prompts leave. Leaving decodes out costs a sort, and is tried only if all of them are too long for that.
            if len(rows) > limits.tokens or self.cost.base(parts.floors) > left:
                rows = self._most_urgent(now, rows, allowance, (planned, left, 2 * seconds), limits.tokens)
                parts = self._parts(rows)
        used, planned = float(self.cost.base(parts.floors)), seconds * MARGIN / correction
        room = Room(
            seconds=seconds,
            tokens=limits.tokens - len(rows),
            places=limits.requests - running,
            reserved=int(RESERVED * limits.requests) if self._prompts.tightest < np.inf else 0,
            cache=limits.free_cache,
            used=used,
            floors=planned - used,
            ceilings=planned - float(self.cost.base(parts.ceilings)),
            unread=parts.floors.unread,
            correction=correction,
            # Without decodes a step that takes no chunk would do nothing, however wrong the predicted times are.
            must=not len(rows) or now - self._prompts.advanced > self.stall,
        )
        return room, rows, parts

    def _parts(self, rows: Ints) -> Parts:
        """One decode of each of these."""
        levels = self._running.levels.take(rows, axis=0).T
        floor, top = levels
        if self._decode_least:
            floor[:] = np.minimum(np.maximum(floor, self._decode_least), top)
        table = self._running.table.take(rows, axis=0)
        floors, ceilings = self._prices.decodes(levels, float(table[:, PROMPT].sum() + table[:, DONE].sum()))
        return Parts(floor, top, np.zeros(0), floors, ceilings)

    def _with_chunks(self, parts: Parts, chunks: Sequence[Chunk]) -> Parts:
        """The decodes and these prompts."""
        if not chunks:
            return parts
        tokens = np.array([chunk.tokens for chunk in chunks], dtype=np.float64)
        floor = np.array([self._prompts.floor(chunk.progress.job) for chunk in chunks], dtype=np.int64)
        top = np.array([ceiling(chunk.progress.job, self.ladder) for chunk in chunks], dtype=np.int64)
        pairs = float(sum(chunk_pairs(chunk.tokens, chunk.progress.computed) for chunk in chunks))
        self._usual = self._prices.prompts(tokens, floor, pairs)
        return Parts(
            floor=np.concatenate([parts.floor, floor]),
            ceiling=np.concatenate([parts.ceiling, top]),
            tokens=tokens,
            floors=parts.floors + self._usual,
            ceilings=parts.ceilings + self._prices.prompts(tokens, top, pairs),
        )

    def _allowance(self, now: float, rows: Ints) -> Floats:
        """Seconds that each decode can wait for its next token and still be on schedule HORIZON tokens later; infinite without a target."""
        table = self._running.table.take(rows, axis=0)
        tpot, done = table[:, TPOT], table[:, DONE]
        # Being ahead or behind is spread over HORIZON tokens. Spent at once, one late step would make the next ones too short to be served,
        # and a request far ahead would starve until it is late. A quarter of the target is the least, as no step can be arbitrarily short.
        ahead = table[:, START] + tpot * done - now
        allowance: Floats = np.maximum(tpot + ahead / HORIZON, tpot / 4)
        # Who cannot end in time even with the shortest steps has nothing to lose any more, and must not hurry all others.
        lost = table[:, END] - now < self.cost.coefficients.step * (table[:, OUTPUT] - done)
        allowance[lost] = np.inf
        return allowance

    def _most_urgent(self, now: float, rows: Ints, allowance: Floats, times: tuple[float, float, float], most: int) -> Ints:
        """As many as fit the step at the floors, most urgent first; some of those without a token for `stall` seconds before them.

        times: seconds that all of them may take, seconds that those may take who can wait, and for how long these can.
        """
        planned, left, patient = times
        last = self._running.table[rows, LAST]
        order = np.lexsort(
            (last, allowance)
        )  # by allowance, of equal ones who has waited longest: requests without a target take turns
        # An eighth of the places at most goes to those that have starved: they advance, and cannot make everybody else late.
        stalled = np.flatnonzero(now - last[order] > self.stall)[: 1 + len(rows) // 8]
        order = np.concatenate([order[stalled], np.delete(order, stalled)])
        floor = np.maximum(self._running.levels[rows[order], 0], self._decode_least)
        sums = Totals(
            decode=np.arange(1.0, len(rows) + 1),
            decode_slots=self._prices.slots[floor].cumsum(),
            decode_pairs=(self._running.table[rows[order], PROMPT] + self._running.table[rows[order], DONE]).cumsum(),
            unread=self._prices.unread[floor].cumsum(),
        )
        seconds = self.cost.base(sums)
        # How many fit the whole step, and how many beside urgent prompts. Between the two, those stay that cannot wait for the next step.
        fits, spare = (int(np.searchsorted(seconds, limit, side="right")) for limit in (planned, left))
        hurried = len(stalled) + int((allowance[order[len(stalled) :]] < patient).sum())
        return rows[np.sort(order[: min(max(min(fits, max(spare, hurried)), 1), most)])]
