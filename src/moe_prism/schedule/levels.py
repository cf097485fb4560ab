"""Quality for the time there is: who is lifted above the floor, and how far, so that the step keeps to its time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..forecast.step_cost import CostModel, LayerFacts, Totals
from .base import Ladder

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class LevelPrices:
    """Per level: K, log share of unread sub-experts, quality; and what one level more adds."""

    def __init__(self, ladder: Ladder, facts: LayerFacts) -> None:
        self.slots: Floats = np.array([level.slots for level in ladder.levels])
        self.unread: Floats = np.array([facts.unread(level.slots) for level in ladder.levels])
        self.quality: Floats = np.array([level.quality for level in ladder.levels])
        self.both: Floats = np.stack([self.slots, self.unread])
        self.more: list[tuple[float, float]] = np.diff(self.both).T.tolist()  # floats of Python: `Climb.take` reads one at a time

    def decodes(self, levels: Ints, pairs: float) -> list[Totals]:
        """For each row of levels [rows, n], the sums of n decodes at these levels."""
        sums = ((self.both @ np.bincount(row, minlength=self.both.shape[1])).tolist() for row in levels)
        count = float(levels.shape[1])
        return [Totals(decode=count, decode_slots=slots, decode_pairs=pairs, unread=unread) for slots, unread in sums]

    def prompts(self, tokens: Floats, levels: Ints, pairs: float) -> Totals:
        """The sums of prompt chunks."""
        slots, unread = (self.both[:, levels] @ tokens).tolist()
        return Totals(prefill=float(tokens.sum()), prefill_slots=slots, prefill_pairs=pairs, unread=unread)


@dataclass(frozen=True)
class Parts:
    """The parts of a step as columns: decodes, one token each, then prompts. Levels may be chosen between floor and ceiling."""

    floor: Ints
    ceiling: Ints
    tokens: Floats  # of the prompts
    floors: Totals  # the sums of the step with everyone at the floor
    ceilings: Totals  # and at the ceiling

    @property
    def decodes(self) -> int:
        return len(self.floor) - len(self.tokens)

    @property
    def weight(self) -> float:
        """Tokens of the step."""
        return float(self.floors.decode + self.floors.prefill)

    def mean(self, values: Floats) -> float:
        """Token-weighted mean of a value per part."""
        return (float(values[: self.decodes].sum()) + float(self.tokens @ values[self.decodes :])) / self.weight


def worthwhile(seconds: Floats, quality: Floats, worth: float) -> int:
    """The lowest level that is worth serving: a share x of quality given up, from the top, buys at least the share `worth` x of time.

    seconds, quality: of every level, cheapest first. Where time hardly depends on K, quality is not thrown after it.
    """
    # A cheap level may be worth it and one above it not. All levels from the highest bad one down are given up, because `lift` climbs
    # rung by rung and may leave a request on any of them. The tolerance keeps the top level itself, which buys nothing for nothing.
    bad = np.flatnonzero(seconds[-1] - seconds < seconds[-1] * (worth * (1 - quality / quality[-1]) - 1e-12))
    return int(bad[-1]) + 1 if len(bad) else 0


def lift(parts: Parts, seconds: float, cost: CostModel, prices: LevelPrices) -> Ints:
    """The level of every part: the floors, then always the lowest part one level up while the step keeps within `seconds`.

    Quality rises ever more slowly with K, so lifting the lowest first buys the most quality per slot. Everyone who climbs a rung
    pays the same per token, so counting them is enough: whole rungs of the ladder first, then as many as fit of the next one.
    """
    limit = seconds / cost.correction(parts.floors)
    if cost.base(parts.ceilings) <= limit:  # the usual case without overload, and the cheapest to find out
        return parts.ceiling
    d, top = parts.decodes, len(prices.slots) - 1
    decodes = _climbers(parts.floor[:d], parts.ceiling[:d], None, top)
    prompts = _climbers(parts.floor[d:], parts.ceiling[d:], parts.tokens, top)
    # Whoever stands below a rung and may go above it climbs it, wherever the floor was. So after a rung everybody is at max(floor, rung),
    # as far as the ceiling allows, and the search goes over the few rungs instead of over the many parts.
    climb = Climb(float(cost.linear(parts.floors)), parts.floors.unread, limit, cost)
    rung = 0
    while rung < top and climb.take(rung, decodes[rung], prompts[rung], prices):
        rung += 1
    chosen = np.maximum(parts.floor, np.minimum(parts.ceiling, rung))
    if rung < top:
        who = np.flatnonzero((parts.floor <= rung) & (parts.ceiling > rung))
        chosen[who[: _some(climb, rung, who, parts, prices)]] += 1
    return chosen


@dataclass
class Climb:
    """The time of the step while parts are lifted."""

    linear: float
    unread: float
    limit: float
    cost: CostModel

    def take(self, rung: int, decodes: float, prompts: float, prices: LevelPrices) -> bool:
        """Lift so many decode and prompt tokens by this rung if the step then keeps its time."""
        # Slots cost what they cost. Reading does not: a sub-expert is read once for all who use it, so the log share of what nobody reads
        # is what adds up over tokens.
        c, (slots, unread) = self.cost.coefficients, prices.more[rung]
        after = self.linear + slots * (decodes * c.decode_slot + prompts * c.prefill_slot)
        left = self.unread + (decodes + prompts) * unread
        if after + self.cost.reading(left) > self.limit:
            return False
        self.linear, self.unread = after, left
        return True


def _some(climb: Climb, rung: int, who: Ints, parts: Parts, prices: LevelPrices) -> int:
    """How many of these, in their order, can climb the rung."""
    decodes = int(np.searchsorted(who, parts.decodes))
    # Decodes all cost the same, so the largest number that fits is found bit by bit. `take` keeps what it has taken, which is why this adds
    # up and never tries a larger number twice. Prompts differ in length and are taken one by one.
    lifted, step = 0, 1 << decodes.bit_length()
    while step:
        if lifted + step <= decodes and climb.take(rung, step, 0.0, prices):
            lifted += step
        step >>= 1
    if lifted < decodes:
        return lifted
    for tokens in parts.tokens[who[decodes:] - parts.decodes].tolist():
        if not climb.take(rung, 0.0, tokens, prices):
            break
        lifted += 1
    return lifted


def _climbers(floor: Ints, ceiling: Ints, tokens: Floats | None, top: int) -> list[float]:
    """[top]: tokens that climb each rung, those with floor <= rung < ceiling."""
    if not len(floor):
        return [0.0] * top
    change = np.bincount(floor, tokens, top + 1) - np.bincount(ceiling, tokens, top + 1)
    climbers: list[float] = change.cumsum().tolist()
    return climbers
