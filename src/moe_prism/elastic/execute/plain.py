"""Compute the kept slots: a reference to read, and a grouped form that does only their work. Both add in float32, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import LayerParts

FEW = 32  # choices (tokens x experts) up to which runs of blocks are merged


def reference(parts: LayerParts, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """out[t] = sum over kept (choice c, block n) of weight[t, c] * W_down[:, S_n] a[S_n], one slot at a time. keep [T, k, N]."""
    layer = parts.layer
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for t in range(x.shape[0]):
        for c in range(index.shape[1]):
            e = int(index[t, c])
            if not keep[t, c].any():
                continue
            for n in torch.where(keep[t, c])[0].tolist():
                a = layer.activations(e, x[t : t + 1], parts.neurons(n))
                out[t] += (layer.project(e, a, parts.neurons(n)) * weight[t, c])[0]
            if layer.down_bias is not None:
                out[t] += layer.down_bias[e] * weight[t, c]
    return out.to(x.dtype)


def grouped(parts: LayerParts, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """The same sum, slots sorted by sub-expert: every block that occurs is read once, whoever asks for it. Shapes as in `reference`.

    With few tokens hardly any block is wanted twice, and neighbouring blocks of one token are computed as one piece instead.
    """
    layer, n_sub = parts.layer, parts.n_sub
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    row, first, end = _pieces(keep.flatten(0, 1), merge=index.numel() <= FEW)
    piece = (index.reshape(-1)[row] * n_sub + first) * (n_sub + 1) + end
    order = piece.argsort(stable=True)
    row = row[order]
    token, w = row // index.shape[1], weight.reshape(-1)[row]
    ids, counts = torch.unique_consecutive(piece[order], return_counts=True)
    start = 0
    for piece_id, count in zip(ids.tolist(), counts.tolist(), strict=True):
        rows = token[start : start + count]
        block, last = divmod(piece_id, n_sub + 1)
        expert, neurons = block // n_sub, slice(block % n_sub * parts.block, last * parts.block)
        y = layer.project(expert, layer.activations(expert, x[rows], neurons), neurons)
        out.index_add_(0, rows, (y * w[start : start + count, None]).float())
        start += count
    if layer.down_bias is not None:
        kept = keep.any(2)
        bias = layer.down_bias[index.clamp(0, layer.num_experts - 1)] * (weight * kept)[:, :, None]
        out += bias.float().sum(1)
    return out.to(x.dtype)


def _pieces(keep: Tensor, *, merge: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(row, first block, end block) of every kept block of keep [rows, N], or of every maximal run of them."""
    if not merge:
        row, block = keep.nonzero(as_tuple=True)
        return row, block, block + 1
    edge = torch.nn.functional.pad(keep.to(torch.int8), (1, 1)).diff(dim=1)  # +1 where a run begins, -1 just after it ends
    begin, end = (edge == 1).nonzero(), (edge == -1).nonzero()
    return begin[:, 0], begin[:, 1], end[:, 1]
