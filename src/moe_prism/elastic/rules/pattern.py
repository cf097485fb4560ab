"""The rule of the paper's released code: the i-th ranked expert gets a fixed number of sub-experts, the best by gate scores."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..base import Rule, Slots
from .top_slots import top_slots


def counts(k_slots: int, k: int, n_sub: int) -> list[int]:
    """Sub-experts per rank. The published lists ([4,4,4,3,1,0,0,0] for 16 of 32) are whole experts, then N-1 and 1; other K end in
    the remainder.
    """
    whole, rest = divmod(k_slots, n_sub)
    row = [n_sub] * whole + ([rest] if rest else [])
    if not rest and 0 < whole < k and n_sub > 1:
        row[-1:] = [n_sub - 1, 1]
    return row + [0] * (k - len(row))


class Pattern(Rule):
    """Ranks by routing weight, blocks inside an expert by the scorer."""

    paper = "arXiv 2510.19366"

    def keep(self, slots: Slots, budget: Tensor) -> Tensor:
        t, k = slots.weight.shape
        weight = slots.weight.float().abs().masked_fill(~slots.valid, -1.0)
        order = weight.argsort(dim=1, descending=True, stable=True)
        rows = _table(k, slots.n_sub, order.device)[slots.valid.sum(1), self.count(slots, budget)]
        per_choice = torch.zeros_like(order).scatter_(1, order, rows)
        inside = top_slots(slots.norms().reshape(t * k, 1, slots.n_sub), per_choice.reshape(-1)).view(t, k, slots.n_sub)
        return inside & slots.valid[:, :, None]


@cache
def _table(k: int, n_sub: int, device: torch.device) -> Tensor:
    """[chosen experts 0..k, slots 0..k*N, rank] -> sub-experts; a token whose router chose fewer experts has its own lists."""
    table = torch.zeros(k + 1, k * n_sub + 1, k, dtype=torch.long)
    for chosen in range(1, k + 1):
        for slots in range(chosen * n_sub + 1):
            table[chosen, slots, :chosen] = torch.tensor(counts(slots, chosen, n_sub))
    return table.to(device)
