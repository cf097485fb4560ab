"""Selection that knows the cache, and what to read ahead. Shapes: T tokens, k experts per token, N sub-experts per expert.

Two levels instead of one: slots whose sub-expert is resident are kept at the operating point's budget, slots that would have to be read
only at a smaller one, the floor. Rules rank slots the same way at every budget, so what is kept lies between the two budgets' own
choices: the loss is bounded by that of the floor run as an operating point, which is measured. Between floor and budget a missing slot
may be read in int8 form instead of being skipped (HOBBIT, arXiv 2411.01433: high precision, low precision or skip by importance).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...elastic.base import Slots
from ...elastic.runtime import Setting, _per_token
from ...errors import UsageError

if TYPE_CHECKING:
    from .layer import StoredLayer


@dataclass(frozen=True)
class Misses:
    """What happens to slots whose sub-expert is not resident. The default reads all of them: the result is the in-memory one.

    floor: budget at which they are read, below the operating point's. low: budget at which they are read in int8 form, between the two;
    None = never. step_seconds: read as many of those between floor and budget as fit into this time per step, the most valuable first,
    instead of none; None = the floor decides alone.
    """

    floor: float = 1.0
    low: float | None = None
    step_seconds: float | None = None

    @property
    def is_exact(self) -> bool:
        return self.floor >= 1 and self.low is None

    def __post_init__(self) -> None:
        if not 0 < self.floor <= 1:
            raise UsageError(f"floor {self.floor:g} is outside (0, 1]", "1 reads every missing slot")
        if self.low is not None and not self.floor <= self.low <= 1:
            raise UsageError(f"int8 budget {self.low:g} is outside [floor, 1]", f"give one from {self.floor:g} to 1")
        if self.step_seconds is not None and self.step_seconds < 0:
            raise UsageError(f"{self.step_seconds:g} seconds per step are impossible", "give a positive number")


@dataclass(frozen=True)
class Choice:
    """keep [T, k, N]; low [E, N]: records to take in int8 form if they are missing, None for none of them."""

    keep: Tensor
    low: np.ndarray | None = None


def choose(layer: StoredLayer, slots: Slots, setting: Setting, misses: Misses) -> Choice:
    """What a batch keeps at one layer, given what is resident now."""
    budget = _per_token(setting.at(layer.plan.layer.index), slots.x)
    rule = layer.rule(setting.rule)
    slots = replace(slots, norms=_once(slots))
    wide = rule.keep(slots, budget)
    if misses.is_exact:
        return Choice(wide)
    there = torch.from_numpy(layer.store.resident(layer.number))[slots.index.clamp(0, layer.plan.layer.num_experts - 1)]
    missing = wide & ~there
    if not missing.any():
        return Choice(wide)
    read = missing & rule.keep(slots, torch.minimum(budget, torch.full_like(budget, misses.floor)))
    if misses.step_seconds is not None:
        read |= _affordable(layer, slots, missing & ~read, _count(slots.index, read), misses.step_seconds)
    keep = (wide & there) | read
    if misses.low is None:
        return Choice(_never_empty(keep, wide, slots))
    cheap = missing & ~read & rule.keep(slots, torch.minimum(budget, torch.full_like(budget, misses.low)))
    keep = _never_empty(keep | cheap, wide, slots)
    low = np.zeros((layer.store.space.experts, layer.store.space.parts), bool)
    _mark(low, slots.index, keep & cheap, True)
    _mark(low, slots.index, keep & ~cheap, False)  # wanted whole by another token of the batch
    return Choice(keep, low)


def _once(slots: Slots) -> Callable[[], Tensor]:
    """The norms, computed at the first call only: several budgets ask for them."""
    found: list[Tensor] = []

    def norms() -> Tensor:
        if not found:
            found.append(slots.norms())
        return found[0]

    return norms


def _never_empty(keep: Tensor, wide: Tensor, slots: Slots) -> Tensor:
    """A token that lost everything keeps the best of its slots, resident or not."""
    empty = ~keep.any(2).any(1) & wide.any(2).any(1)
    if not empty.any():
        return keep
    values = slots.values().masked_fill(~wide, -1.0).flatten(1)
    best = torch.zeros_like(values, dtype=torch.bool)
    best[torch.arange(len(values)), values.argmax(1)] = True
    return keep | (best.view_as(keep) & empty[:, None, None])


def _affordable(layer: StoredLayer, slots: Slots, open_: Tensor, already: int, seconds: float) -> Tensor:
    """The most valuable of the open slots whose records can be read in a layer's share of a step, after `already` others."""
    space, price = layer.store.space, layer.store.seconds_per_record
    room = int(seconds / space.layers / price) - already if price else open_.numel()
    if room <= 0:
        return torch.zeros_like(open_)
    values = slots.values().masked_fill(~open_, -1.0)
    # a record is read once for all tokens: rank records by the largest value anybody puts on them
    best = torch.full((space.experts * space.parts,), -1.0)
    number = slots.index.clamp(0, space.experts - 1)[:, :, None] * space.parts + torch.arange(space.parts)
    best.scatter_reduce_(0, number.flatten(), values.flatten(), "amax")
    taken = torch.zeros_like(best, dtype=torch.bool)
    taken[best.topk(min(room, len(best))).indices] = True
    return open_ & taken[number]


def _count(index: Tensor, keep: Tensor) -> int:
    """Distinct records among kept slots."""
    token, choice, part = keep.nonzero(as_tuple=True)
    return int(torch.unique(index[token, choice] * keep.shape[2] + part).numel())


def _mark(table: np.ndarray, index: Tensor, keep: Tensor, value: bool) -> None:
    token, choice, part = keep.nonzero(as_tuple=True)
    table[index[token, choice].numpy(), part.numpy()] = value
