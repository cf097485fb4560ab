"""Kept slots sorted by sub-expert and cut into tiles of equal height, without the host ever waiting for the device.

A slot is one (token t, choice c, block n), numbered (t k + c) N + n; its sub-expert is index[t, c] N + n. Dropped slots get one id past
the last sub-expert and sort to the end. How many tiles there are depends on what is kept, so the list has room for the worst case of
the batch's shape and ends in group -1: one launch shape for every K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Sorted slots [S], and per tile [M] its sub-expert (-1: nothing to do) and its piece [first, end) of the sorted slots; int32."""

    slots: Tensor
    group: Tensor
    first: Tensor
    end: Tensor


def capacity(slots: int, groups: int, height: int) -> int:
    """The most tiles that `slots` slots of at most `groups` sub-experts can fill: each group begins a tile of its own."""
    occupied = min(groups, slots)
    return (slots - occupied) // height + occupied


def align(index: Tensor, keep: Tensor, num_experts: int, height: int) -> Tiles:
    """index [T, k], keep [T, k, N] bool -> tiles of at most `height` slots each. Equal sub-experts stay in slot order.

    `index` may hold anything where nothing is kept.
    """
    n_sub, groups, device = keep.shape[2], num_experts * keep.shape[2], index.device
    block = torch.arange(n_sub, device=device)
    key = torch.where(keep, index[:, :, None] * n_sub + block, groups).reshape(-1).to(torch.int32)
    key, slots = key.sort(stable=True)
    bounds = torch.searchsorted(key, torch.arange(groups + 1, dtype=torch.int32, device=device), out_int32=True)
    tiles = (bounds.diff() + (height - 1)) // height
    last = tiles.cumsum(0, dtype=torch.int32)
    number = torch.arange(capacity(len(slots), groups, height), dtype=torch.int32, device=device)
    group = torch.searchsorted(last, number, right=True, out_int32=True)
    live, g = group < groups, group.clamp(max=groups - 1)
    first = bounds[g] + (number - last[g] + tiles[g]) * height
    return Tiles(slots.to(torch.int32), torch.where(live, group, -1), first, torch.minimum(first + height, bounds[g + 1]))
