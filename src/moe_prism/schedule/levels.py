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
    """The parts of a step as columns: decode parts first. Levels may be chosen between floor and ceiling."""

    tokens: Floats
    floor: Ints
    ceiling: Ints
    decodes: int  # how many of the parts are decodes
    prefill_pairs: float
    decode_pairs: float

    def totals(self, levels: Ints, prices: Prices) -> Totals:
        """The sums of the step at these levels."""
        d = self.decodes
        slots = self.tokens * prices.slots[levels]
        return Totals(
            prefill=float(self.tokens[d:].sum()),
            decode=float(d),
            prefill_slots=float(slots[d:].sum()),
            decode_slots=float(slots[:d].sum()),
            prefill_pairs=self.prefill_pairs,
            decode_pairs=self.decode_pairs,
            unread=float((self.tokens * prices.unread[levels]).sum()),
        )


def lift(parts: Parts, seconds: float, least_quality: float, cost: CostModel, prices: Prices) -> Ints:
    """The level of every part: the floors, then always the lowest part one level up while the step keeps within `seconds`.

    Quality rises ever more slowly with K, so lifting the lowest first buys the most quality per slot. The predicted time of every
    prefix of that sequence comes from prefix sums. `least_quality`: lift until the token-weighted mean is this high whatever the time.
    """
    floors = parts.totals(parts.floor, prices)
    may = (prices.steps >= parts.floor) & (prices.steps < parts.ceiling)
    chosen = np.flatnonzero(may)
    if not len(chosen):
        return parts.floor
    n = len(parts.floor)
    level, who = np.divmod(chosen, n)
    tokens = parts.tokens[who]
    slots = tokens * prices.more_slots[level]
    decode_slots = np.where(who < parts.decodes, slots, 0.0)
    path = Totals(
        prefill=floors.prefill,
        decode=floors.decode,
        prefill_slots=floors.prefill_slots + (slots - decode_slots).cumsum(),
        decode_slots=floors.decode_slots + decode_slots.cumsum(),
        prefill_pairs=floors.prefill_pairs,
        decode_pairs=floors.decode_pairs,
        unread=floors.unread + (tokens * prices.more_unread[level]).cumsum(),
    )
    limit = seconds / cost.correction(floors)
    lifts = int(np.searchsorted(cost.base(path), limit, side="right"))
    if least_quality > 0:
        weight = float(parts.tokens.sum())
        missing = least_quality * weight - float((parts.tokens * prices.quality[parts.floor]).sum())
        if missing > 0:
            gained = (tokens * prices.more_quality[level]).cumsum()
            lifts = max(lifts, min(int(np.searchsorted(gained, missing - 1e-9)) + 1, len(who)))
    return parts.floor + np.bincount(who[:lifts], minlength=n)
