"""Quality for the time there is: who is lifted above the floor, and how far, so that the step keeps to its time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .base import Ladder
from .cost import CostModel, LayerFacts, Totals

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Prices:
    """Per level: K, log share of unread sub-experts, quality; and what one level more adds."""

    def __init__(self, ladder: Ladder, facts: LayerFacts) -> None:
        self.slots: Floats = np.array([level.slots for level in ladder.levels])
        self.unread: Floats = np.array([facts.unread(level.slots) for level in ladder.levels])
        self.quality: Floats = np.array([level.quality for level in ladder.levels])
        self.both: Floats = np.stack([self.slots, self.unread])
        self.more_slots, self.more_unread = np.diff(self.slots), np.diff(self.unread)

    def decodes(self, levels: Ints, pairs: float) -> Totals:
        """The sums of one decode at each of these levels."""
        slots, unread = self.both[:, levels].sum(axis=1).tolist()
        return Totals(decode=float(len(levels)), decode_slots=slots, decode_pairs=pairs, unread=unread)

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


def lift(parts: Parts, seconds: float, cost: CostModel, prices: Prices) -> Ints:
    """The level of every part: the floors, then always the lowest part one level up while the step keeps within `seconds`.

    Quality rises ever more slowly with K, so lifting the lowest first buys the most quality per slot. Prefix sums give the predicted
    time after every lift: whole rungs of the ladder first, then the part of the next rung that still fits.
    """
    limit = seconds / cost.correction(parts.floors)
    if cost.base(parts.ceilings) <= limit:
        return parts.ceiling
    d, levels = parts.decodes, len(prices.slots)
    decodes = _climbers(parts.floor[:d], parts.ceiling[:d], None, levels)
    prompts = _climbers(parts.floor[d:], parts.ceiling[d:], parts.tokens, levels)
    rungs = _after(
        parts.floors, decodes * prices.more_slots, prompts * prices.more_slots, (decodes + prompts) * prices.more_unread
    )
    full = int(np.searchsorted(cost.base(rungs), limit, side="right"))
    chosen = np.maximum(parts.floor, np.minimum(parts.ceiling, full))
    if full == levels - 1:
        return chosen
    who = np.flatnonzero((parts.floor <= full) & (parts.ceiling > full))
    tokens = np.concatenate([np.ones(d), parts.tokens])[who]
    slots = tokens * prices.more_slots[full]
    decode_slots = np.where(who < d, slots, 0.0)
    path = _after(
        rungs.at(full - 1) if full else parts.floors, decode_slots, slots - decode_slots, tokens * prices.more_unread[full]
    )
    chosen[who[: int(np.searchsorted(cost.base(path), limit, side="right"))]] += 1
    return chosen


def _climbers(floor: Ints, ceiling: Ints, tokens: Floats | None, levels: int) -> Floats:
    """[levels - 1]: tokens that climb each rung, those with floor <= rung < ceiling."""
    if not len(floor):
        return np.zeros(levels - 1)
    change = np.bincount(floor, tokens, levels) - np.bincount(ceiling, tokens, levels)
    climbers: Floats = change.cumsum()[:-1]
    return climbers


def _after(start: Totals, decode_slots: Floats, prefill_slots: Floats, unread: Floats) -> Totals:
    """The sums after the first 1, 2, ... of these additions."""
    return Totals(
        prefill=start.prefill,
        decode=start.decode,
        prefill_slots=start.prefill_slots + prefill_slots.cumsum(),
        decode_slots=start.decode_slots + decode_slots.cumsum(),
        prefill_pairs=start.prefill_pairs,
        decode_pairs=start.decode_pairs,
        unread=start.unread + unread.cumsum(),
    )
