"""Selection that knows the cache, and what to read ahead. Shapes: T tokens, k experts per token, N sub-experts per expert.

Two levels instead of one: slots whose sub-expert is resident are kept at the operating point's budget, slots that would have to be read
only at a smaller one, the floor. Rules rank slots the same way at every budget, so what is kept lies between the two budgets' own
choices: the loss is bounded by that of the floor run as an operating point, which is measured. Between floor and budget a missing slot
may be read in int8 form instead of being skipped. HOBBIT (arXiv 2411.01433) chooses among the same three by the routing weights of the
stronger experts of a token: that is `Misses.shares`. Fate (arXiv 2502.12224) chooses in prompts by how often an expert is used: that is
`Misses.prompt_rate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from ..elastic.execute.base import Candidates, Settled
from ..errors import UsageError
from ..kernels.selection import Choosing, Held, select
from .store import ExpertStore
from .wanted import Wanted, sort_entries

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]

FEW_TOKENS = 8
"""A step of more tokens is a prompt, or decodes so many requests: it wants nearly all experts, each for some of its tokens."""


@dataclass(frozen=True)
class Misses:
    """What happens to slots whose sub-expert is not resident. The default reads all of them: the result is the in-memory one.

    floor: budget at which they are read, below the operating point's. low: budget at which they are read in int8 form, between the two;
    None = never. shares (T1, T2): the routing weight of a token's stronger experts decides instead, as a share of all of it: up to T1 an
    expert's slots are read as they are, up to T2 in the smaller form, and beyond that they are skipped. step_seconds: read as many of
    those between floor and budget as fit into this time per step, the most valuable first, instead of none; None = the floor decides
    alone. prompt_rate: in steps of more than FEW_TOKENS, what is read of the least used experts is read in the smaller form, as many of
    them as have at most this share of all uses together (`rare`); 0 = none.
    """

    floor: float = 1.0
    low: float | None = None
    step_seconds: float | None = None
    shares: tuple[float, float] | None = None
    prompt_rate: float = 0.0

    def is_exact(self, tokens: int | None = None) -> bool:
        """Whether steps of so many tokens, or all steps, read everything as it is."""
        few = self.floor >= 1 and self.low is None and self.shares is None
        return few and (not self.prompt_rate or (tokens is not None and tokens <= FEW_TOKENS))

    def has_rare(self, tokens: int) -> bool:
        """Whether steps of so many tokens read some experts in the smaller form because few use them."""
        return self.prompt_rate > 0 and tokens > FEW_TOKENS

    @property
    def needs_low(self) -> bool:
        """Whether records are read in int8 form."""
        return self.low is not None or self.prompt_rate > 0 or (self.shares is not None and self.shares[0] < self.shares[1])

    def __post_init__(self) -> None:
        if self.shares is not None:
            if self.floor < 1 or self.low is not None or self.step_seconds is not None:
                raise UsageError("shares of the weight and budgets both say what is read on a miss", "give one of them")
            if not 0 <= self.shares[0] <= self.shares[1] <= 1:
                raise UsageError(
                    f"shares {self.shares[0]:g} and {self.shares[1]:g} are no T1 <= T2 within [0, 1]",
                    "1,1 reads every missing slot",
                )
        if not 0 <= self.prompt_rate <= 1:
            raise UsageError(f"prompt rate {self.prompt_rate:g} is outside [0, 1]", "0 reads every missing slot as it is")
        if not 0 < self.floor <= 1:
            raise UsageError(f"floor {self.floor:g} is outside (0, 1]", "1 reads every missing slot")
        if self.low is not None and not self.floor <= self.low <= 1:
            raise UsageError(f"int8 budget {self.low:g} is outside [floor, 1]", f"give one from {self.floor:g} to 1")
        if self.step_seconds is not None and self.step_seconds < 0:
            raise UsageError(f"{self.step_seconds:g} seconds per step are impossible", "give a positive number")


class Prepared(NamedTuple):
    """What is kept, sorted by key. source: the routing weights [T, k] that it was sorted with."""

    entries: Wanted
    source: Tensor


def choose(store: ExpertStore, layer: int, candidates: Candidates, misses: Misses) -> Settled:
    """What a batch keeps at one layer, given what is resident now. UsageError where a store of whole experts should skip sub-experts."""
    found = _fused(store, layer, candidates, misses)
    if found is not None:
        return found
    wide = candidates.keep()
    if misses.is_exact(len(wide)):
        return Settled(wide)
    experts, parts = store.space.experts, store.space.parts
    if parts != wide.shape[2]:
        raise UsageError("a store of whole experts knows no sub-experts to skip", "leave miss floors and the prompt rate out")
    index, values = candidates.index, candidates.values().float()
    sure = wide & up_to(candidates.weight, misses.shares[0]) if misses.shares else candidates.keep(misses.floor)
    if misses.step_seconds is not None:
        there = torch.from_numpy(store.resident(layer))[index.clamp(0, experts - 1)]
        missing = wide & ~there
        already = _count(index, missing & sure)
        sure = sure | _affordable(store, index, values.masked_fill(~(missing & ~sure), -1.0), already, misses.step_seconds)
    cheap = sure if misses.low is None else candidates.keep(misses.low)
    if misses.shares:
        cheap = wide & up_to(candidates.weight, misses.shares[1])
    if misses.has_rare(len(wide)):
        sure = sure & ~rare(index, wide.any(2), experts, misses.prompt_rate)[index.clamp(0, experts - 1)][:, :, None]
    keep, low = torch.empty_like(wide), np.zeros((experts, parts), np.bool_)
    flags = [flag.contiguous().numpy() for flag in (wide, sure, cheap)]
    some = decide(index.contiguous().numpy(), *flags, store.slots_of(layer), values.contiguous().numpy(), keep.numpy(), low)
    return Settled(keep, low if some else None)


def up_to(weight: Tensor, share: float) -> Tensor:
    """[T, k, 1] bool: experts whose stronger ones hold at most this share of a token's routing weight [T, k]. The strongest is one."""
    size = weight.abs().float()
    ordered, order = size.sort(dim=1, descending=True, stable=True)
    stronger = torch.empty_like(size).scatter_(1, order, ordered.cumsum(1) - ordered)
    return (stronger <= share * size.sum(1, keepdim=True))[:, :, None]


def rare(index: Tensor, kept: Tensor, experts: int, rate: float) -> Tensor:
    """[E] bool: the least used experts, as many as have at most this share of all uses together. kept [T, k]: uses that count."""
    uses = torch.bincount(index[kept], minlength=experts)
    ordered, order = uses.sort(stable=True)
    return torch.zeros(experts, dtype=torch.bool).scatter_(0, order, ordered.cumsum(0) <= rate * uses.sum())


def _fused(store: ExpertStore, layer: int, candidates: Candidates, misses: Misses) -> Settled | None:
    """`choose` for few tokens in two calls; None where scorer, rule or batch are not of the compiled kind."""
    experts, parts = store.space.experts, store.space.parts
    tokens = len(candidates.index)
    if misses.step_seconds is not None or misses.shares is not None or misses.has_rare(tokens):
        return None
    limits = [] if misses.is_exact(tokens) else [misses.floor] if misses.low is None else [misses.floor, misses.low]
    found = candidates.fused(limits)
    if found is None:
        return None
    arguments, held, budgets = found
    if parts != arguments.norms.weight.shape[1]:
        return None
    keep, low, some, *wanted = choose_entries(arguments, held, budgets, store.slots_of(layer), layer * experts * parts)
    return Settled(torch.from_numpy(keep), low if some else None, Prepared(Wanted(*wanted), candidates.weight))


@njit(nogil=True, cache=True)
def choose_entries(
    candidates: Choosing, held: Held | None, budgets: Floats, slot: Ints, base: int
) -> tuple[Flags, Flags, bool, Ints, Ints, Ints, Ints, Floats, Floats]:
    """(keep, low, whether anything is low, the fields of `Wanted`).

    `selection.select`, `decide` if there are two budgets or more, `sort_entries`, one after the other.
    held: what the operating point's budget is held with. budgets [B, T]: the operating point's, the floor's, that of int8 records;
    slot, low: as `decide`; base: the layer's first key.
    """
    index, weight = candidates.chosen, candidates.weight
    experts, parts = slot.shape
    keeps = np.empty((len(budgets), *index.shape, parts), np.bool_)
    values = np.empty((*index.shape, parts), np.float32)
    select(candidates, held, budgets, keeps, values)
    keep, low, some = keeps[0], np.zeros((experts, parts), np.bool_), False
    if len(budgets) > 1:
        keep = np.empty(values.shape, np.bool_)
        some = decide(index, keeps[0], keeps[1], keeps[-1], slot, values, keep, low)
    return (keep, low, some, *sort_entries(index, weight, keep, experts, base))


# Keeps more than six parameters: eight arrays, each read by its own name; numba unpacks an object anew at every call.
@njit(nogil=True, cache=True)
def decide(index: Ints, wide: Flags, sure: Flags, cheap: Flags, slot: Ints, values: Floats, keep: Flags, low: Flags) -> bool:
    """keep [T, k, N] = wide where the record is resident, else wide and sure or cheap; low [E, N]: missing and cheap for all who want it.

    index [T, k]; wide, sure, cheap [T, k, N]; slot [E, N], negative = missing. A token that lost everything keeps the best of its wide
    slots. Returns whether anything is low.
    """
    tokens, k, parts = wide.shape
    exact = np.zeros(low.shape, np.bool_)
    for t in range(tokens):
        some, best, at = False, np.float32(-1), -1
        for c in range(k):
            for n in range(parts):
                keep[t, c, n] = False
                if not wide[t, c, n]:
                    continue
                there = slot[index[t, c], n] >= 0
                keep[t, c, n] = there or sure[t, c, n] or cheap[t, c, n]
                some |= keep[t, c, n]
                if keep[t, c, n] and not there:
                    exact[index[t, c], n] |= sure[t, c, n]
                    low[index[t, c], n] = True
                if values[t, c, n] > best:
                    best, at = values[t, c, n], c * parts + n
        if not some and at >= 0:
            c, n = at // parts, at % parts
            keep[t, c, n] = True
            exact[index[t, c], n] = True
    found = False
    for e in range(low.shape[0]):
        for n in range(parts):
            low[e, n] = low[e, n] and not exact[e, n]
            found |= low[e, n]
    return found


def _affordable(store: ExpertStore, index: Tensor, values: Tensor, already: int, seconds: float) -> Tensor:
    """The most valuable of the open slots (values [T, k, N], below 0 where a slot is not open) whose records can be read in a layer's
    share of a step, after `already` others.
    """
    space, price = store.space, store.price
    open_ = values >= 0
    room = int(seconds / space.layers / price) - already if price else open_.numel()
    if room <= 0:
        return torch.zeros_like(open_)
    # a record is read once for all tokens: rank records by the largest value anybody puts on them
    best = torch.full((space.experts * space.parts,), -1.0)
    number = index.clamp(0, space.experts - 1)[:, :, None] * space.parts + torch.arange(space.parts)
    best.scatter_reduce_(0, number.flatten(), values.flatten(), "amax")
    taken = torch.zeros_like(best, dtype=torch.bool)
    taken[best.topk(min(room, len(best))).indices] = True
    return open_ & taken[number]


def _count(index: Tensor, keep: Tensor) -> int:
    """Distinct records among kept slots."""
    token, choice, part = keep.nonzero(as_tuple=True)
    return int(torch.unique(index[token, choice] * keep.shape[2] + part).numel())
