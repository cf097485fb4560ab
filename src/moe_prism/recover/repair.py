"""Closed-form repair of W_down: least squares, per expert and band of dropped blocks, on calibration inputs.

Drop j of an expert's N blocks for a token and its output misses W_down a_dropped. What is kept often tells what is missing, so that
part of it can be had for nothing: with a the activations, z those of them that are kept, both times the routing weight, and c
what compensation adds already, D minimises

    sum over tokens of || W_down (a - z) - c - D z ||^2  +  ridge ||D||^2

over the tokens that drop j blocks, at several budgets under the default rule: a ridge regression towards the original W_down. D depends
on how many blocks an expert lost and not on the budget, so one set of tensors serves every rule, K and budget, and tokens of
different budgets share a batch. (Own method; arXiv 2510.19366 tunes the router instead.)
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..elastic import LayerParts
from ..elastic.compensate import Compensator, compensator
from ..elastic.repair import band_of

STRENGTHS = (10.0, 1.0, 0.1, 0.01)  # of the ridge, relative to the mean squared activation; the best on the held-out part is used
PRIOR = 0.1  # of the layer's mean added to the expert's own: an expert that is hardly ever cut keeps its W_down


class Normal:
    """The normal equations of one layer, summed over any number of batches, in two parts: one to fit, one held out to choose the ridge."""

    def __init__(self, parts: LayerParts, bands: int) -> None:
        layer = parts.layer
        self.parts, self.bands = parts, bands
        device = "cpu" if layer.down.is_meta else layer.down.device  # of a streamed model, whose weights come when it runs
        self.gram = torch.zeros(2, bands, layer.num_experts, layer.width, layer.width, device=device)
        self.cross = torch.zeros(2, bands, layer.num_experts, layer.width, layer.hidden, device=device)

    @cached_property
    def added(self) -> Compensator | None:
        """What compensation adds already; made when the layer's weights are there."""
        return compensator(self.parts)

    @staticmethod
    def bytes(parts: LayerParts, bands: int) -> int:
        """What one layer's equations hold in memory."""
        layer = parts.layer
        return 8 * bands * layer.num_experts * layer.width * (layer.width + layer.hidden)

    @staticmethod
    def solving_bytes(parts: LayerParts, bands: int) -> int:
        """What `solve` holds beside them: both parts added up, and D."""
        layer = parts.layer
        return bands * layer.num_experts * layer.width * (4 * (layer.width + layer.hidden) + 2 * layer.hidden)

    def add(self, x: Tensor, index: Tensor, weight: Tensor, keeps: list[Tensor], *, held: bool = False) -> None:
        """x [T, d], index and weight [T, k], keeps: one keep [T, k, N] per budget. Ids outside [0, E) mean no expert."""
        k = index.shape[1]
        flat, scale = index.reshape(-1), weight.reshape(-1, 1).float()
        kept = [keep.flatten(0, 1) for keep in keeps]
        for expert in range(self.parts.layer.num_experts):
            rows = (flat == expert).nonzero()[:, 0]
            if len(rows):
                for mask in kept:
                    self._add(int(held), expert, x[rows // k], scale[rows], mask[rows])

    def _add(self, part: int, expert: int, x: Tensor, weight: Tensor, keep: Tensor) -> None:
        """Inputs x [S, d] of one expert with routing weights [S, 1], under keep [S, N]."""
        parts = self.parts
        band = band_of(parts.n_sub - keep.sum(1), self.bands, parts.n_sub)
        down, a = parts.layer.down[expert].float(), parts.layer.activations(expert, x).float()
        z, missing = a * weight, torch.zeros(len(x), parts.layer.hidden, device=x.device)
        if self.added is not None:
            own, one = torch.full((len(x), 1), expert, device=x.device), keep[:, None]
            z = a * self.added.weights(own, weight, one)
            missing -= self.added(x, own, weight, one)
        z = z * keep.repeat_interleave(parts.block, 1)
        missing += (a * weight - z) @ down.T
        for b in range(self.bands):
            mine = band == b
            if mine.any():
                self.gram[part, b, expert] += z[mine].T @ z[mine]
                self.cross[part, b, expert] += z[mine].T @ missing[mine]

    def solve(self) -> Tensor:
        """D [bands, E, d, f] in bfloat16; zero where nothing was seen, or where no repair helps on the held-out part."""
        gram, cross = self.gram.sum(0), self.cross.sum(0)
        own = gram.diagonal(dim1=-2, dim2=-1).double().mean(-1)  # [bands, E]
        scale = own + PRIOR * own.mean(1, keepdim=True)
        out = torch.zeros(*cross.shape[:2], cross.shape[3], cross.shape[2], dtype=torch.bfloat16)
        for b, e in (own > 0).nonzero().tolist():  # one at a time: float64 copies of all would be eight times the equations
            strength = self._strength(b, e, scale[b, e])
            if strength is not None:
                out[b, e] = _ridge(gram[b, e], cross[b, e], strength * scale[b, e]).T.to("cpu", torch.bfloat16)
        return out

    def _strength(self, band: int, expert: int, scale: Tensor) -> float | None:
        """The strength whose fit to the first part errs least on the second; None if none of them gains there."""
        (gram, held), (cross, wanted) = self.gram[:, band, expert], self.cross[:, band, expert].double()
        best, least = None, 0.0  # the squared error less that of D = 0, from the held-out equations
        for strength in STRENGTHS:
            d = _ridge(gram, cross, strength * scale)
            error = float((d * (held.double() @ d - 2 * wanted)).sum())
            if error < least:
                best, least = strength, error
        return best


def _ridge(gram: Tensor, cross: Tensor, ridge: Tensor) -> Tensor:
    """D transposed [f, d], float64."""
    eye = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    found: Tensor = torch.linalg.solve(gram.double() + (ridge + 1e-12) * eye, cross.double())
    return found
