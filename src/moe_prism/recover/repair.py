"""Closed-form repair of W_down: least squares, per expert and band of dropped blocks, on calibration inputs.

Drop j of an expert's N blocks for a token and its output misses W_down a_dropped. What is kept often tells what is missing, so that
part of it can be had for nothing: with a the activations, z those of them that are kept and w the routing weight, D minimises

    sum over tokens of w^2 || W_down (a - z) - D z ||^2  +  ridge ||D||^2

over the tokens that drop j blocks, at several budgets under the default rule: a ridge regression towards the original W_down. D depends
on how many blocks an expert lost and not on the budget, so one set of tensors serves every rule, K and budget, and tokens of
different budgets share a batch. (Own method; arXiv 2510.19366 tunes the router instead.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..elastic import LayerPlan
from ..elastic.repair import band_of

RIDGE = 0.01  # of the mean squared activation; on prism-nano .003 is within 2 % of it, .1 loses 5 to 7 % and 1 loses 12 to 20 %
PRIOR = 0.1  # of the layer's mean added to the expert's own: an expert that is hardly ever cut keeps its W_down


class Normal:
    """The normal equations of one layer, summed over any number of batches."""

    def __init__(self, plan: LayerPlan, bands: int) -> None:
        layer = plan.layer
        self.plan, self.bands = plan, bands
        device = layer.down.device
        self.gram = torch.zeros(bands, layer.num_experts, layer.width, layer.width, device=device)
        self.cross = torch.zeros(bands, layer.num_experts, layer.width, layer.hidden, device=device)

    @staticmethod
    def bytes(plan: LayerPlan, bands: int) -> int:
        """What one layer's equations hold in memory."""
        layer = plan.layer
        return 4 * bands * layer.num_experts * layer.width * (layer.width + layer.hidden)

    def add(self, x: Tensor, index: Tensor, weight: Tensor, keeps: list[Tensor]) -> None:
        """x [T, d], index and weight [T, k], keeps: one keep [T, k, N] per budget. Ids outside [0, E) mean no expert."""
        k = index.shape[1]
        flat, scale = index.reshape(-1), weight.reshape(-1, 1).float()
        kept = [keep.flatten(0, 1) for keep in keeps]
        for expert in range(self.plan.layer.num_experts):
            rows = (flat == expert).nonzero()[:, 0]
            if len(rows):
                a = self.plan.layer.activations(expert, x[rows // k]).float() * scale[rows]
                for mask in kept:
                    self._add(expert, a, mask[rows])

    def _add(self, expert: int, a: Tensor, keep: Tensor) -> None:
        """Weighted activations a [S, f] of one expert under keep [S, N]."""
        plan = self.plan
        band = band_of(plan.n_sub - keep.sum(1), self.bands, plan.n_sub)
        down = plan.layer.down[expert].float()
        for b in range(self.bands):
            mine = band == b
            if mine.any():
                z = a[mine] * keep[mine].repeat_interleave(plan.block, 1)
                self.gram[b, expert] += z.T @ z
                self.cross[b, expert] += z.T @ ((a[mine] - z) @ down.T)

    def solve(self) -> Tensor:
        """D [bands, E, d, f] in bfloat16; zero where nothing was seen."""
        own = self.gram.diagonal(dim1=-2, dim2=-1).double().mean(-1)  # [bands, E]
        ridge = RIDGE * (own + PRIOR * own.mean(1, keepdim=True)) + 1e-12
        out = torch.zeros(*self.cross.shape[:2], self.cross.shape[3], self.cross.shape[2], dtype=torch.bfloat16)
        eye = torch.eye(self.gram.shape[-1], dtype=torch.float64, device=self.gram.device)
        for b, expert in (own > 0).nonzero().tolist():  # one at a time: float64 copies of all would be eight times the equations
            solved = torch.linalg.solve(self.gram[b, expert].double() + ridge[b, expert] * eye, self.cross[b, expert].double())
            out[b, expert] = solved.T.to("cpu", torch.bfloat16)
        return out
