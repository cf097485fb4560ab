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
    """Per level: K, quality, log share of unread sub-experts; and what one level more adds."""

    def __init__(self, ladder: Ladder, facts: LayerFacts) -> None:
        self.slots: Floats = np.array([level.slots for level in ladder.levels])
        self.quality: Floats = np.array([level.quality for level in ladder.levels])
        self.unread: Floats = np.array([facts.unread(level.slots) for level in ladder.levels])
        self.more_slots, self.more_quality, self.more_unread = (np.diff(a) for a in (self.slots, self.quality, self.unread))
        self.steps: Ints = np.arange(len(ladder) - 1)[:, None]


@dataclass(frozen=True)
class Parts:
    """The parts of a step as columns: decodes, one token each, then prompts. Levels may be chosen between floor and ceiling."""

    floor: Ints
    ceiling: Ints
    decode_pairs: float
    tokens: Floats  # of the prompts
    prefill_pairs: float = 0.0

    @property
    def decodes(self) -> int:
        return len(self.floor) - len(self.tokens)

    @property
    def weight(self) -> float:
        """Tokens of the step."""
        return self.decodes + float(self.tokens.sum())

    def mean(self, values: Floats) -> float:
        """Token-weighted mean of a value per part."""
        return (float(values[: self.decodes].sum()) + float(self.tokens @ values[self.decodes :])) / self.weight

    def totals(self, levels: Ints, prices: Prices) -> Totals:
        """The sums of the step at these levels."""
        d, slots, unread = self.decodes, prices.slots[levels], prices.unread[levels]
        return Totals(
            prefill=float(self.tokens.sum()),
            decode=float(d),
            prefill_slots=float(self.tokens @ slots[d:]),
            decode_slots=float(slots[:d].sum()),
            prefill_pairs=self.prefill_pairs,
            decode_pairs=self.decode_pairs,
            unread=float(unread[:d].sum() + self.tokens @ unread[d:]),
        )


def lift(parts: Parts, seconds: float, cost: CostModel, prices: Prices) -> Ints:
    """The level of every part: the floors, then always the lowest part one level up while the step keeps within `seconds`.

    Quality rises ever more slowly with K, so lifting the lowest first buys the most quality per slot. Prefix sums give the predicted
    time after every lift: whole rungs of the ladder first, then the part of the next rung that still fits.
    """
    floors = parts.totals(parts.floor, prices)
    limit = seconds / cost.correction(floors)
    if cost.base(parts.totals(parts.ceiling, prices)) <= limit:
        return parts.ceiling
    d, may = parts.decodes, (prices.steps >= parts.floor) & (prices.steps < parts.ceiling)
    decodes, prompts = may[:, :d].sum(axis=1), may[:, d:] @ parts.tokens
    rungs = _after(floors, decodes * prices.more_slots, prompts * prices.more_slots, (decodes + prompts) * prices.more_unread)
    full = int(np.searchsorted(cost.base(rungs), limit, side="right"))
    levels = np.maximum(parts.floor, np.minimum(parts.ceiling, full))
    if full == len(may):
        return levels
    who = np.flatnonzero(may[full])
    tokens = np.concatenate([np.ones(d), parts.tokens])[who]
    slots = tokens * prices.more_slots[full]
    decode_slots = np.where(who < d, slots, 0.0)
    path = _after(rungs.at(full - 1) if full else floors, decode_slots, slots - decode_slots, tokens * prices.more_unread[full])
    levels[who[: int(np.searchsorted(cost.base(path), limit, side="right"))]] += 1
    return levels


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
