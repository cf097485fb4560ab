"""A rank-r linear term per sub-expert: its output as far as r directions of the input tell it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..base import LayerParts
from .base import MIN_ROWS, Blocks, Compensator, ExpertSample, outputs

STRENGTH = 0.1  # of the ridge penalty, in mean squared inputs
ROUNDS = 12  # of the orthogonal iteration for the r leading directions
FEW = 64  # dropped slots up to which weights are gathered per slot


class LowRankTerm(Compensator):
    """Adds mean + sum_j (read_j . x) write_j for a dropped block: `mean` [E, N, d], `read` and `write` [E, N, r, d].

    Reduced-rank ridge regression of the block's output on the layer input over the rows where it is dropped: with the full fit
    y ~ B x, the best rank-r fit is V V^T B, V the leading eigenvectors of B (X^T X + penalty) B^T (Izenman 1975).
    """

    method = "low-rank"

    def __init__(self, parts: LayerParts) -> None:
        super().__init__(parts)
        self.mean, self.read, self.write = (self.tensor(name) for name in ("mean", "read", "write"))

    @classmethod
    def fit(cls, parts: LayerParts, samples: Sequence[ExpertSample], rank: int) -> dict[str, Tensor]:
        shape = (parts.layer.num_experts, parts.n_sub)
        mean = torch.zeros(*shape, parts.layer.hidden)
        read, write = torch.zeros(2, *shape, rank, parts.layer.hidden)
        for expert, sample in enumerate(samples):
            for n in range(parts.n_sub):
                x = sample.x[sample.dropped[:, n]]
                if len(x) >= MIN_ROWS:
                    mean[expert, n], read[expert, n], write[expert, n] = _reduced_rank(x, outputs(parts, x, expert, n), rank)
        return {name: t.bfloat16() for name, t in (("mean", mean), ("read", read), ("write", write))}

    def estimate(self, x: Tensor, expert: int, block: int) -> Tensor:
        return self.mean[expert, block] + x.float() @ self.read[expert, block].T @ self.write[expert, block]

    def terms(self, x: Tensor, blocks: Blocks) -> Tensor:
        total = blocks.combine(self.mean.flatten(0, 1))
        read, write = self.read.flatten(0, 1), self.write.flatten(0, 1)
        inner = self._inner(x.float(), blocks, read) * blocks.weight[:, None]
        for j in range(read.shape[1]):
            total += blocks.combine(write[:, j], inner[:, j])
        return total

    def _inner(self, x: Tensor, blocks: Blocks, read: Tensor) -> Tensor:
        """read . x of every dropped slot, [D, r]: gathered for few slots, else one small matmul per sub-expert."""
        if len(blocks.block) <= FEW:
            return torch.einsum("sd,srd->sr", x[blocks.token], read[blocks.block])
        out = torch.empty(len(blocks.block), read.shape[1], device=x.device)
        order = blocks.block.argsort(stable=True)
        ids, counts = torch.unique_consecutive(blocks.block[order], return_counts=True)
        for block, rows in zip(ids.tolist(), torch.split(order, counts.tolist()), strict=True):
            out[rows] = x[blocks.token[rows]] @ read[block].T
        return out

    def parameters(self) -> tuple[int, int]:
        return (2 * self.read.shape[2] + 1) * self.parts.layer.hidden, 0


def _reduced_rank(x: Tensor, y: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(mean [d], read [r, d], write [r, d]) with y ~ mean + read(x) write, for x [S, d_in], y [S, d]."""
    x, y = x.double(), y.double()
    mx, my = x.mean(0), y.mean(0)
    xc = x - mx
    gram, cross = xc.T @ xc, xc.T @ (y - my)
    slope = torch.linalg.solve(gram + _penalty(gram), cross)
    write = _leading(slope, cross, rank).T
    read = (slope @ write.T).T
    return my - read @ mx @ write, read, write


def _penalty(gram: Tensor) -> Tensor:
    return (STRENGTH * gram.diagonal().mean() + 1e-12) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def _leading(slope: Tensor, cross: Tensor, rank: int) -> Tensor:
    """The r leading eigenvectors [d, r] of cross^T slope, by orthogonal iteration from its largest columns: no d x d product."""
    extra = min(rank + 4, slope.shape[1])
    start = (cross * slope).sum(0).topk(extra).indices
    basis = torch.zeros(slope.shape[1], extra, dtype=slope.dtype, device=slope.device)
    basis[start, torch.arange(extra, device=slope.device)] = 1.0
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(cross.T @ (slope @ basis)).Q
    values, vectors = torch.linalg.eigh(basis.T @ (cross.T @ (slope @ basis)))
    leading: Tensor = basis @ vectors[:, values.argsort(descending=True)[:rank]]
    return leading
