"""Kept slots of experts whose inputs and activations a token multiplies by numbers of its own (`routing.base.Factors`).

Shapes: T tokens, k experts per token, N sub-experts per expert, d hidden, f neurons per expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...model.base import MoELayer, linear
from ...routing.base import Factors
from ..base import LayerParts
from .base import Settled


def scaled_activations(layer: MoELayer, expert: int, x: Tensor, factors: Factors) -> Tensor:
    """a [S, f] of rows x [S, d] of one expert with their factors."""
    gate, up = layer.gate, layer.up
    g = None
    if gate is not None:
        bias = layer.gate_bias
        g = linear(x * factors.gate.to(x.dtype), gate[expert], None if bias is None else bias[expert])
    bias = layer.up_bias
    u = linear(x * factors.up.to(x.dtype), up[expert], None if bias is None else bias[expert])
    return layer.activate(g, u) * factors.neurons.to(x.dtype)


def scaled(parts: LayerParts, x: Tensor, index: Tensor, weight: Tensor, settled: Settled) -> Tensor:
    """[T, d]: the sum over kept slots, one expert after the other: tokens differ in what they multiply by, experts do not."""
    layer, factors = parts.layer, settled.factors
    assert factors is not None
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    there = settled.keep.any(2)
    for e in torch.unique(index[there]).tolist():
        token, choice = torch.where((index == e) & there)
        a = scaled_activations(layer, e, x[token], factors.of(token))
        y = layer.project(e, a * settled.keep[token, choice].repeat_interleave(parts.block, 1))
        y = y if layer.down_bias is None else y + layer.down_bias[e]
        out.index_add_(0, token, (y * weight[token, choice, None]).float())
    return out.to(x.dtype)
