"""Kept slots of a layer in planes of four bits, multiplied as they lie (`kernels/plane_tiles.py`). Shapes as in `base.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import threads
from ...kernels.plane_jobs import add_job, dot_job, in_bytes
from ...kernels.plane_tiles import AVAILABLE, OUTPUTS
from ...model import MoELayer
from ..planes import UPPER, PlacedPlanes
from .batch_products import SlotGroups, Span, activated
from .tiled import PIECE

STRIP = 4  # tiles: strips of an output row end on a cache line


def from_planes(
    layer: MoELayer, planes: Sequence[PlacedPlanes], bits: int, slots: tuple[Tensor, Tensor, Tensor, Tensor]
) -> Tensor | None:
    """As `execute.reference` over what `planes` decode to at a width, biases aside; inputs are rounded to 16 bits in groups.

    planes: of gate, where there is one, up and down; slots: x, index, weight, keep. None where this processor cannot, or a token has an
    expert twice.
    """
    x, index, weight, keep = slots
    usable = AVAILABLE and x.dtype == torch.float32 and x.is_cpu and threads.can_share()
    if not usable or (torch.is_grad_enabled() and x.requires_grad):
        return None
    groups = SlotGroups.of(index, keep, layer.num_experts)
    if not groups.distinct:
        return None
    *first, down = planes
    factor, out = weight.reshape(-1).contiguous(), torch.zeros(x.shape)
    inputs = _in_bytes(x, first[-1], bits)
    for span in groups.spans(PIECE // (len(first) * down.inputs)):
        pre = torch.empty(span.end - span.begin, len(first) * down.inputs)
        order = torch.arange(len(pre))
        values = [*_values(first[0], bits, Product(inputs, pre, order), groups, span), down.inputs // OUTPUTS, len(first)]
        threads.run(dot_job, [*values, *(p.places.upper.data_ptr() for p in first)], pre.numel() * x.shape[1])
        a = activated(layer, pre, factor, groups.choice[span.begin : span.end])
        tiles, work = x.shape[1] // OUTPUTS, a.numel() * x.shape[1]
        strip = tiles if work < threads.ONE_THREAD_WORK else -(-tiles // (STRIP * torch.get_num_threads())) * STRIP
        product = Product(_in_bytes(a, down, bits), out, order)
        threads.run(add_job, [*_values(down, bits, product, groups, span), tiles, strip, down.places.upper.data_ptr()], work)
    return out


Inputs = tuple[Tensor, Tensor]
"""Whole numbers [R, G, 2, g] and scales [R, G, 2]."""


class Product(NamedTuple):
    """Rows of inputs and of the result, and whose they are. order: numbers of a span's slots."""

    inputs: Inputs
    out: Tensor
    order: Tensor


def _in_bytes(x: Tensor, planes: PlacedPlanes, bits: int) -> Inputs:
    groups = x.shape[1] // planes.group
    whole, scales = torch.empty(len(x), groups, 2, planes.group, dtype=torch.int8), torch.empty(len(x), groups, 2)
    unit = 1 / 16 if bits > UPPER else 1.0
    in_bytes(x.contiguous().detach().numpy(), planes.group, planes.offset(bits), unit, whole.numpy(), scales.numpy())
    return whole, scales


def _values(planes: PlacedPlanes, bits: int, of: Product, groups: SlotGroups, span: Span) -> list[int]:
    """What both jobs read."""
    whole, scales = of.inputs
    values = [
        *planes.form(bits),
        planes.places.lower.data_ptr(),
        whole.data_ptr(),
        scales.data_ptr(),
        of.out.data_ptr(),
        of.out.stride(0),
    ]
    values += [groups.row.data_ptr(), of.order.data_ptr() - 8 * span.begin]
    return [*values, groups.offset.data_ptr(), groups.active.data_ptr(), span.first, span.last]
