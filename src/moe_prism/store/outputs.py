"""Computing: the outputs of records that lie in slots of an arena, for the tokens that want them.

Shapes: S entries (token, sub-expert), d hidden, T tokens.
"""

from __future__ import annotations

import time

import numpy as np
from torch import Tensor

from .arena import Arena
from .fast_pool import SlotTable
from .fetch import Times
from .wanted import Floats, Ints, Wanted, add_rows

PARTIAL_NUMBERS = 1 << 20  # numbers of outputs that are held before they are added up


class SlotOutputs:
    """What slots of an arena give for the rows of a batch."""

    def __init__(self, arena: Arena, places: SlotTable, times: Times) -> None:
        self.arena, self.places, self.times = arena, places, times

    def can_hold(self, x: Tensor, wanted: Wanted) -> bool:
        """Whether the outputs of all entries may be held at once."""
        return len(wanted.row) * x.shape[1] <= PARTIAL_NUMBERS

    def slots(self, wanted: Wanted, first: int, last: int) -> Ints:
        """Slot [S] of each entry of keys first..last - 1."""
        slots: Ints = self.places.of[wanted.keys[first:last]]
        count = wanted.end[first:last] - wanted.begin[first:last]
        return slots if count.sum() == len(slots) else np.repeat(slots, count)

    def compute(self, x: Tensor, row: Ints, weight: Floats, slot: Ints) -> Floats:
        """[S, d]: routing weight x output of entries, each the row of x it is about, its weight and its slot [S]."""
        began = time.perf_counter()
        found = self.arena.outputs(x, row, weight, slot)
        self.times.computed += time.perf_counter() - began
        return found

    def add(self, x: Tensor, wanted: Wanted, first: int, last: int, out: Floats) -> None:
        """Add the outputs of keys first..last - 1, all of them resident, to out [T, d], in pieces of bounded size."""
        if first == last:
            return
        slot = self.slots(wanted, first, last)
        start, stop = int(wanted.begin[first]), int(wanted.end[last - 1])
        step = max(1, PARTIAL_NUMBERS // x.shape[1])
        for first_entry in range(start, stop, step):
            last_entry = min(stop, first_entry + step)
            part = slice(first_entry, last_entry)
            own = slot[first_entry - start : last_entry - start]
            add_rows(self.compute(x, wanted.row[part], wanted.weight[part], own), wanted.row[part], out)
