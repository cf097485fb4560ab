"""A threshold for all rows of a step together: what a block is worth to everybody decides whether it is read.

Rows share what they read, so a block that others want as well is nearly free, and one that a single row wants is dear. After OEA
(arXiv 2511.02237), which does this with whole experts and router scores; the objective and its solution are our own.

A row keeps a slot by itself where its value v reaches the cutoff c of the row's budget. With u = (v / c)^2, leaving a slot out costs u.
Reading a block costs 1 - p once for all rows, and a slot at a block that is read still costs its multiplications, p. At an exchange rate
g, the least sum of both is that a slot is used where u >= p g, and a block read where the sum over its rows of (u - p g) is at least
(1 - p) g: every block decides alone. g is the lowest rate from 1 on (a grid) at which the step costs no more than if every row had kept
what it wants by itself. So one row alone keeps exactly what `threshold` keeps, and many rows read less and keep more.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..base import LayerParts, Slots, is_compiled
from .threshold import Threshold
from .top_slots import top_slots

PRICE = 0.04
"""p: what a further row costs at a block that is read, as a share of the first; benchmarks/batch_blocks.py --price measures it."""
RATES, RATIO = 256, 1.02
"""Exchange rates that are tried: 1, RATIO, RATIO^2, ..."""


class BatchBlocks(Threshold):
    """The rows of a forward that are at this rule decide together. Reads `cutoffs` of the parts; a row always keeps its best slot."""

    paper = "arXiv 2511.02237"
    depends_on_batch: ClassVar[bool] = True
    units: ClassVar[tuple[str, ...]] = ("slots", "bytes")
    controls: ClassVar[tuple[str, ...]] = ("none",)  # what a request keeps is up to the others as well

    def __init__(self, parts: LayerParts) -> None:
        super().__init__(parts)
        self.compiled = None  # `selection.select` decides row by row
        self.rates = RATIO ** torch.arange(RATES, dtype=torch.float64, device=self.cutoffs.device)

    def keep(self, slots: Slots, budget: Tensor) -> Tensor:
        values, experts = slots.values(), self.parts.layer.num_experts
        if is_compiled(values, budget, self.cutoffs):
            from ...kernels.shared_blocks import Shared, mark_shared  # compiles on first use

            keep = torch.empty(values.shape, dtype=torch.bool)
            index, valid = slots.index.contiguous().numpy(), slots.valid.contiguous().numpy()
            shared = Shared(values.numpy(), index, valid, experts, PRICE, self.rates.numpy())
            mark_shared(shared, self.cutoffs.numpy(), budget.numpy(), keep.numpy())
            return keep
        best = top_slots(values, torch.ones_like(budget, dtype=torch.long)) & slots.valid[:, :, None]
        numbers = torch.arange(slots.n_sub, device=values.device)
        block = slots.index.clamp(0, experts - 1)[:, :, None] * slots.n_sub + numbers
        worth = (values.double() / self.level(budget).double()[:, None, None]).square()
        worth = worth.nan_to_num(torch.inf, torch.inf).masked_fill(~slots.valid[:, :, None], -1.0)  # no cutoff: priceless
        rows = _Rows(worth.flatten(), best.flatten(), block.flatten(), experts * slots.n_sub)
        return rows.used(rows.rate(self.rates))[0].view(values.shape)


class _Rows(NamedTuple):
    """The slots of a batch [S] (S = T k N): u of each, -1 where there is none; the rows' best ones; which of `blocks` it is of."""

    worth: Tensor
    best: Tensor
    block: Tensor
    blocks: int

    def used(self, rates: Tensor) -> Tensor:
        """[R, S] bool: what is used at each of several exchange rates [R]."""
        floor = torch.zeros(self.blocks, dtype=torch.bool, device=self.block.device)
        floor = floor.index_put((self.block,), self.best, accumulate=True)
        rates = rates[:, None]
        over = (self.worth - PRICE * rates).clamp(min=0)
        gain = over.new_zeros(len(rates), self.blocks).index_add_(1, self.block, over)
        read = (gain >= (1 - PRICE) * rates) | floor
        return ((self.worth >= PRICE * rates) | self.best) & read[:, self.block]

    def costs(self, used: Tensor) -> Tensor:
        """[R]: what slots used [R, S] cost, reads and multiplications."""
        read = used.new_zeros(len(used), self.blocks, dtype=torch.long).index_add_(1, self.block, used.long()) > 0
        return PRICE * used.sum(1).double() + (1 - PRICE) * read.sum(1).double()

    def rate(self, rates: Tensor) -> Tensor:
        """[1]: the lowest of rates [R] at which the step costs no more than rows that choose alone, found by halving.

        Where two rates cost alike, or a dearer one more, the search decides: both forms of it halve alike. No device is asked for a number.
        """
        limit = self.costs(((self.worth >= 1) | self.best)[None])
        low, high = (torch.full((1,), end, device=rates.device) for end in (0, len(rates) - 1))
        for _ in range(len(rates).bit_length()):
            middle, going = (low + high) // 2, low < high
            fits = self.costs(self.used(rates.index_select(0, middle))) <= limit
            low, high = torch.where(going & ~fits, middle + 1, low), torch.where(going & fits, middle, high)
        return rates.index_select(0, low)
