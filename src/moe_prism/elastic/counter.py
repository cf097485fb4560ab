"""What ran, counted: how often each block, expert and token of a layer was there. `prices.py` has what each of them costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Tallies = dict[str, Tensor]
"""Sums by what is read: the keys of `prices.Prices`."""
WITHIN = {"gates": "blocks", "lost": "experts"}
"""What is part of something larger that another token of the batch may read."""
OF_EXPERTS = ("blocks", "low", "experts", "gates", "lost")
"""What is read of an expert's own weights, which several experts may share."""
SOURCE = 16.0  # bits of what is read as it is stored


def at_width(bits: float) -> str:
    """What blocks that are read at so many bits are counted as."""
    return f"blocks at {bits:g}"


def bits_of(name: str) -> float:
    """The reverse; 0 for anything else."""
    return float(name.removeprefix("blocks at ")) if name.startswith("blocks at ") else 0.0


@dataclass
class Counter:
    """Sums since the last reset, for measured costs. E experts, N sub-experts each.

    `per_token` counts every token that reads something; `per_batch` counts it once per forward, whoever reads it: what is read together
    is read once. `sends`: devices that compute something for a token, summed over tokens. Sums stay where they were made: a GPU is waited
    for when one is read. The replay of a CUDA graph is not counted. devices: that the experts are dealt out to in order; 0: each expert
    has one of its own.
    """

    experts: int
    n_sub: int
    tokens: int = 0
    batches: int = 0
    devices: int = 0
    _chosen: int | Tensor = 0
    _sends: int | Tensor = 0
    per_token: Tallies = field(default_factory=dict)
    per_batch: Tallies = field(default_factory=dict)

    def add(
        self,
        index: Tensor,
        keep: Tensor | None,
        *,
        selects: bool = False,
        low: Tensor | None = None,
        widths: Tensor | None = None,
        same: Tensor | None = None,
    ) -> None:
        """index [T, k] (ids outside [0, E) mean none), keep [T, k, N] or None for everything.

        selects: whether predictor and gate neurons of the chosen experts were read, and dropped blocks were made up for; low [E, N]:
        blocks that were taken in their smaller form; widths [T, k, N]: bits of every slot, None where all are as they are stored;
        same [E]: the expert whose weights each one shares, so that a batch reads them once.
        """
        if index.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self.tokens += index.shape[0]
        self.batches += 1
        valid = (index >= 0) & (index < self.experts)
        self._chosen = self._chosen + valid.sum()
        flat = index.clamp(0, self.experts - 1).reshape(-1)
        kept = (valid[:, :, None] if keep is None else keep & valid[:, :, None]).expand(-1, -1, self.n_sub).flatten(0, 1)
        used = kept.any(1)
        self._sends = self._sends + (self._visits(flat, used, len(index)) if self.devices else used.sum())
        blocks = torch.zeros(self.experts, self.n_sub, dtype=torch.float64, device=index.device)
        rows: Tallies = {
            "blocks": blocks.index_add(0, flat, kept.double()),
            "experts": _count(flat, used, self.experts),
        }
        if selects:
            chosen = _count(flat, valid.reshape(-1), self.experts)
            rows["predictors"] = chosen
            rows["gates"] = rows["dropped"] = chosen[:, None] - rows["blocks"]
            rows["lost"] = chosen - rows["experts"]
            rows["scaled"] = rows["experts"]
        if low is not None:
            rows["low"] = rows["blocks"] * low
            rows["blocks"] = rows["blocks"] * ~low
        within = {name: _together(row, same) for name, row in rows.items()}
        if widths is not None:
            rows |= self._at_widths(flat, kept, widths.flatten(0, 1), rows.pop("blocks"))
        more = torch.zeros_like(blocks)  # what somebody reads at more bits contains what others read at fewer
        for name, row in sorted(rows.items(), key=lambda item: -bits_of(item[0])):
            _add(self.per_token, name, row)
            if name in OF_EXPERTS or bits_of(name):
                row = _together(row, same)
            once = (row > 0).double()
            if name in WITHIN:  # who keeps the block, or one of the expert's, reads this as a part of it
                once = once * (within[WITHIN[name]] == 0)
            if bits_of(name):
                once, more = once * (more == 0), more + row
            _add(self.per_batch, name, once)
        if selects:
            _add(self.per_token, "tokens", blocks.new_full((1,), float(index.shape[0])))
            _add(self.per_batch, "tokens", blocks.new_ones(1))

    def _at_widths(self, flat: Tensor, kept: Tensor, widths: Tensor, blocks: Tensor) -> Tallies:
        """Kept blocks [E, N] by the width they are read at; those that are read as they are stored stay `blocks`."""
        found: Tallies = {}
        for bits in torch.unique(widths).tolist():
            if bits:
                mine = kept & (widths == bits)
                row = torch.zeros_like(blocks).index_add(0, flat, mine.double())
                found["blocks" if bits == SOURCE else at_width(bits)] = row
        return found

    def add_skipped(self, skipped: Tensor, unused: Tensor) -> None:
        """Neurons [E, N] of blocks counted above that were not computed: by tokens, and by no token of the batch."""
        _add(self.per_token, "skipped", skipped)
        _add(self.per_batch, "skipped", unused)

    def add_extra(self, number: Tensor, parameters: Sequence[int]) -> None:
        """Experts that are not weights: number [T, k] of each choice (outside 0..X - 1: none), and what each of the X reads."""
        sizes = torch.tensor(parameters, dtype=torch.float64, device=number.device)
        here = number[(number >= 0) & (number < len(sizes))].reshape(-1)
        counts = torch.bincount(here, minlength=len(sizes)).double()
        _add(self.per_token, "extra", (counts * sizes).sum(0, keepdim=True))
        _add(self.per_batch, "extra", ((counts > 0) * sizes).sum(0, keepdim=True))

    def _visits(self, flat: Tensor, used: Tensor, tokens: int) -> Tensor:
        """Devices that compute something for a token, summed over tokens. flat, used [T k]: experts, and whether each keeps any block."""
        place = device_of(flat, self.experts, self.devices)
        seen = torch.zeros(tokens, self.devices, dtype=torch.int32, device=flat.device)
        return (seen.scatter_add_(1, place.view(tokens, -1), used.view(tokens, -1).int()) > 0).sum()

    @property
    def sends(self) -> int:
        """Devices that computed something for a token, summed over tokens."""
        return int(self._sends)

    @property
    def chosen(self) -> int:
        """Experts that tokens were routed to, in all."""
        return int(self._chosen)

    @property
    def kept(self) -> int:
        """Slots kept in all."""
        return int(sum(float(row.sum()) for name, row in self.per_token.items() if name in ("blocks", "low") or bits_of(name)))


def device_of(experts: Tensor, number: int, devices: int) -> Tensor:
    """The device of each expert, of so many in all, where they are dealt out in order and evenly."""
    return experts * devices // number


def _count(flat: Tensor, marked: Tensor, experts: int) -> Tensor:
    """How often each id [E] occurs among the marked entries."""
    return torch.zeros(experts, dtype=torch.float64, device=flat.device).index_add(0, flat, marked.double())


def _together(row: Tensor, same: Tensor | None) -> Tensor:
    """Counts [E, ...] of experts that share weights, added up at the one that stands for them."""
    return row if same is None else torch.zeros_like(row).index_add(0, same.to(row.device), row)


def _add(sums: Tallies, name: str, row: Tensor) -> None:
    sums[name] = sums[name] + row if name in sums else row
