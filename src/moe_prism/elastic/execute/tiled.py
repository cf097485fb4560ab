"""The fast executor of a CPU: kept slots sorted by sub-expert, products by the compiled jobs, activations by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import LayerParts
from . import one_call
from .batch_products import Columns, SlotGroups, Span, activated, add, dot, usable

PIECE = 1 << 20  # pre-activations computed before they are used, so that they are still in the cache then


def tiled(parts: LayerParts, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor, row: Tensor | None = None) -> Tensor | None:
    """As `execute.reference`, of x[row] if `row` is given (without making it).

    None where the layer is not `usable`, or a token has an expert twice: slots of a group would share a row.
    """
    layer, stored, m = parts.layer, usable(parts, x), parts.block
    if stored is None:
        return None
    if row is None:
        out = one_call.given(parts, x, index, weight, keep)
        if out is not None:
            return out
    groups = SlotGroups.of(index, keep, layer.num_experts)
    if not groups.distinct:
        return None
    x = x if x.stride(1) == 1 else x.contiguous()
    factor = weight.reshape(-1).contiguous()
    width = len(stored.first) * m
    asked = groups if row is None else groups._replace(row=row[groups.row])
    out = torch.zeros(len(index), x.shape[1])
    for span in groups.spans(PIECE // width):
        slots = span.end - span.begin
        pre = torch.empty(slots, width)
        dot(x, asked, span, Columns(stored.first, m, m), pre, torch.arange(slots))
        if layer.up_bias is not None:
            pre += _biases(parts, groups, span)
        a = activated(layer, pre, factor, groups.choice[span.begin : span.end])
        add(a, groups, span, stored.down, out)
    if layer.down_bias is not None:
        bias = layer.down_bias[index.clamp(0, layer.num_experts - 1)]
        out += (bias * (weight * keep.any(2)).unsqueeze(2)).sum(1)
    return out


def _biases(parts: LayerParts, groups: SlotGroups, span: Span) -> Tensor:
    """[S, 2m or m]: gate and up biases of the slots of a span."""
    active = groups.active[span.first : span.last]
    halves = [b.reshape(-1, parts.block) for b in (parts.layer.gate_bias, parts.layer.up_bias) if b is not None]
    return torch.cat(halves, 1)[active].repeat_interleave(groups.offset[active + 1] - groups.offset[active], 0)
