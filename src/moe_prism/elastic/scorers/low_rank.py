"""A predictor that all experts of a layer share up to a small head: low-rank maps of the input, then a ridge regression per expert.

h = V (x - mean) with V [R, d] is computed once per token; the block norms of expert e are predicted as
exp(B_e [h, |h|, sqrt(gate contributions), 1]), so a chosen expert reads N (2 R + N r + 1) numbers where `ridge` reads N (d + N r + 1).
V comes in closed form from reduced-rank regression: with B the slopes of every expert's own ridge regression on x, stacked [E N, d],
and C the covariance of x, the best rank-R approximation in prediction error is the truncated SVD of B C^(1/2).
It pays where R < k N. On prism-nano it loses to `ridge` (docs/explanation/method.md):
what its experts respond to has no small common subspace.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import UsageError
from ..base import LayerParts, Scorer, gate_activations, per_expert
from ..side_tensors import LOW_RANK_HEADS, LOW_RANK_MAP
from . import ridge
from .ridge_fit import ridge_fit

RANK = 16  # of the shared projections; the hidden size where that is less


class LowRankScorer(Scorer):
    """Reads `low_rank.map` [R, d + 1] (V and the offset V mean) and `low_rank.heads` [E, N, 2 R + N r + 1] of the parts."""

    def __init__(self, parts: LayerParts) -> None:
        super().__init__(parts)
        if LOW_RANK_MAP not in parts.tensors:
            raise UsageError("the model was refactored without the low-rank predictor", "refactor with --extra-scorers low-rank")
        device = parts.layer.up.device
        self.map = parts.tensors[LOW_RANK_MAP].to(device).float()
        self.heads = parts.tensors[LOW_RANK_HEADS].to(device).float()
        self.scale = ridge.gate_scale(parts)

    def __call__(self, x: Tensor, index: Tensor) -> Tensor:
        shared = _shared(x.float(), self.map)

        def predict(expert: int, tokens: Tensor) -> Tensor:
            z = _features(self.parts, shared[tokens], x[tokens], expert, self.scale[expert])
            return (z @ self.heads[expert].T).clamp(max=ridge.CEILING).exp()

        return per_expert(index, self.parts.layer.num_experts, predict, self.parts.n_sub)

    def parameters_per_expert(self) -> int:
        return self.heads[0].numel()

    def parameters_per_token(self) -> int:
        return self.map.numel()

    @property
    def reads_gates(self) -> bool:
        return self.parts.gates > 0

    @staticmethod
    def fit(parts: LayerParts, samples: Sequence[Tensor]) -> dict[str, Tensor]:
        """The two tensors (bfloat16) from the sampled inputs [S_e, d] of each expert."""
        device, experts = parts.layer.up.device, range(parts.layer.num_experts)
        inputs = [x.to(device, parts.layer.up.dtype) for x in samples]
        targets = [
            _logs(ridge.block_norms(parts, x, e)) if len(x) else torch.zeros(0, parts.n_sub)
            for e, x in zip(experts, inputs, strict=True)
        ]
        shared_map = _reduce(inputs, targets).to(torch.bfloat16)
        scale = ridge.gate_scale(parts)
        width = 2 * len(shared_map) + parts.n_sub * parts.gates + 1
        heads = torch.zeros(len(experts), parts.n_sub, width, dtype=torch.bfloat16)
        for e, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            if len(x):
                z = _features(parts, _shared(x.float(), shared_map.float()), x, e, scale[e]).double()
                heads[e] = ridge_fit(z, y)[0].T.to("cpu", torch.bfloat16)
        return {LOW_RANK_MAP: shared_map.cpu(), LOW_RANK_HEADS: heads}


def _shared(x: Tensor, shared_map: Tensor) -> Tensor:
    """[h, |h|] of rows x [S, d]."""
    h = x @ shared_map[:, :-1].T - shared_map[:, -1]
    return torch.cat([h, h.abs()], 1)


def _features(parts: LayerParts, shared: Tensor, x: Tensor, expert: int, scale: Tensor) -> Tensor:
    """[h, |h|, sqrt(gate contributions), 1] of rows x [S, d]."""
    gates = gate_activations(parts, x, expert) if parts.gates else None
    return ridge._join(shared, gates, scale)


def _logs(norms: Tensor) -> Tensor:
    y = norms.double()
    return (y + ridge.FLOOR * y.mean() + 1e-30).log()


def _reduce(inputs: list[Tensor], targets: list[Tensor]) -> Tensor:
    """V and V mean, [R, d + 1], rows scaled so that every h has unit variance."""
    rows = torch.cat(inputs).double()
    mean = rows.mean(0)
    values, axes = torch.linalg.eigh(
        torch.cov(rows.T) if len(rows) > 1 else torch.eye(len(mean), dtype=torch.float64, device=rows.device)
    )
    spread = values.clamp(min=1e-9 * float(values[-1].clamp(min=1e-30))).sqrt()
    slopes = [
        ridge_fit(torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64, device=x.device)], 1), y)[0][:-1].T
        * len(x) ** 0.5
        for x, y in zip(inputs, targets, strict=True)
        if len(x)
    ]
    _, _, right = torch.linalg.svd(torch.cat(slopes) @ (axes * spread), full_matrices=False)
    v = right[: min(RANK, rows.shape[1])] @ (axes / spread).T
    return torch.cat([v, (v @ mean)[:, None]], 1)
