"""Compute the kept slots: a reference to read, and a grouped form that does only their work. Both add in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LayerPlan


def reference(plan: LayerPlan, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """out[t] = sum over kept (choice c, block n) of weight[t, c] * W_down[:, S_n] a[S_n], one slot at a time. keep [T, k, N]."""
    layer = plan.layer
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for t in range(x.shape[0]):
        for c in range(index.shape[1]):
            e = int(index[t, c])
            if not keep[t, c].any():
                continue
            for n in torch.where(keep[t, c])[0].tolist():
                a = layer.activations(e, x[t : t + 1], plan.neurons(n))
                out[t] += (layer.project(e, a, plan.neurons(n)) * weight[t, c])[0]
            if layer.down_bias is not None:
                out[t] += layer.down_bias[e] * weight[t, c]
    return out.to(x.dtype)


def grouped(plan: LayerPlan, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """The same sum, tokens grouped by expert and by run of neighbouring kept blocks.

    A run is computed as one contiguous slice, so a token that keeps a whole expert pays for no split. Shapes as in `reference`.
    """
    layer = plan.layer
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    runs = _runs(keep.reshape(-1, plan.n_sub))  # rows: (choice row, first block, end block)
    group = (index.reshape(-1)[runs[:, 0]] * (plan.n_sub + 1) + runs[:, 1]) * (plan.n_sub + 1) + runs[:, 2]
    order = group.argsort(stable=True)
    ids, counts = torch.unique_consecutive(group[order], return_counts=True)
    rows = runs[order, 0]
    token, w = rows // index.shape[1], weight.reshape(-1)[rows]
    start = 0
    for gid, count in zip(ids.tolist(), counts.tolist(), strict=True):
        part = slice(start, start + count)
        e, first, end = gid // (plan.n_sub + 1) ** 2, gid // (plan.n_sub + 1) % (plan.n_sub + 1), gid % (plan.n_sub + 1)
        neurons = slice(first * plan.block, end * plan.block)
        y = layer.project(e, layer.activations(e, x[token[part]], neurons), neurons)
        out.index_add_(0, token[part], (y * w[part, None]).float())
        start += count
    if layer.down_bias is not None:
        kept = keep.any(2)
        bias = layer.down_bias[index.clamp(0, layer.num_experts - 1)] * (weight * kept)[:, :, None]
        out += bias.float().sum(1)
    return out.to(x.dtype)


def _runs(keep: Tensor) -> Tensor:
    """Maximal runs of kept blocks: [R, 3] = (row, first block, end block) from keep [rows, N]."""
    padded = torch.nn.functional.pad(keep.to(torch.int8), (1, 1))
    edge = padded.diff(dim=1)  # [rows, N + 1]: +1 where a run begins, -1 just after it ends
    begin, end = (edge == 1).nonzero(), (edge == -1).nonzero()
    return torch.cat([begin, end[:, 1:]], 1)
