"""Kept slots without the neurons whose gate is small: the gate projection is computed, and up and down only for what passes.

Shapes: T tokens, k experts per token, E experts, N sub-experts per expert, f neurons per expert, S rows of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...model.base import MoELayer, linear
from ..base import LayerParts
from .base import Settled


def gate_sizes(layer: MoELayer, expert: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """(gate projection [S, f] of rows x [S, d], its size after the activation)."""
    assert layer.gate is not None
    bias = layer.gate_bias
    gate = linear(x, layer.gate[expert], None if bias is None else bias[expert])
    return gate, layer.activate(gate, torch.ones_like(gate)).float().abs()


def above(parts: LayerParts, x: Tensor, index: Tensor, weight: Tensor, settled: Settled) -> tuple[Tensor, Tensor, Tensor]:
    """(output [T, d], neurons skipped by tokens [E, N], neurons of blocks that are read which no token of the batch uses [E, N]).

    This says what is computed and counts it; it multiplies whole experts all the same.
    """
    layer, cutoff = parts.layer, settled.cutoff
    assert cutoff is not None
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    skipped = torch.zeros(layer.num_experts, parts.n_sub, dtype=torch.float64, device=x.device)
    unused = torch.zeros_like(skipped)
    there = settled.keep.any(2)
    for e in torch.unique(index[there]).tolist():
        token, choice = torch.where((index == e) & there)
        rows, blocks = x[token], settled.keep[token, choice]
        gate, size = gate_sizes(layer, e, rows)
        wanted = blocks.repeat_interleave(parts.block, 1)
        used = (size >= cutoff[token, None].to(size.dtype)) & wanted
        bias = layer.up_bias
        up = linear(rows, layer.up[e], None if bias is None else bias[e])
        y = layer.project(e, layer.activate(gate, up) * used)
        y = y if layer.down_bias is None else y + layer.down_bias[e]
        out.index_add_(0, token, (y * weight[token, choice, None]).float())
        skipped[e] = _by_block(wanted & ~used, parts).sum(0).double()
        unused[e] = _by_block((wanted.any(0) & ~used.any(0))[None], parts)[0].double()
    return out.to(x.dtype), skipped, unused


def _by_block(marked: Tensor, parts: LayerParts) -> Tensor:
    """[S, N]: marked neurons [S, f] of every block."""
    return marked.view(len(marked), parts.n_sub, parts.block).sum(2)
