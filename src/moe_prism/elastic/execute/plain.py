"""Compute the kept slots: a reference to read, and two vectorised forms for any storage. All add in float32, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import LayerParts

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What torch multiplies group by group in one call."""


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
    """The same sum, slots sorted by expert: one product for each of the N blocks, over all experts. Shapes as in `reference`."""
    choice = _sorted_choices(index, keep.any(2))
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for n in range(parts.n_sub):
        mine = choice[keep.flatten(0, 1)[choice, n]]
        if len(mine):
            _add_outputs(out, parts, (x, index, weight), mine, parts.neurons(n))
    return _with_bias(parts, out, index, weight, keep).to(x.dtype)


def whole_experts(parts: LayerParts, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """The same sum by whole experts, in which the neurons of dropped blocks are set to zero: the price of the full budget."""
    choice = _sorted_choices(index, keep.any(2))
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    if len(choice):
        _add_outputs(out, parts, (x, index, weight), choice, slice(None), keep.flatten(0, 1)[choice])
    return _with_bias(parts, out, index, weight, keep).to(x.dtype)


def _sorted_choices(index: Tensor, wanted: Tensor) -> Tensor:
    """The numbers t * k + c of the wanted choices of index [T, k], wanted [T, k] bool, sorted by expert, then token."""
    choice = wanted.reshape(-1).nonzero()[:, 0]
    return choice[index.reshape(-1)[choice].argsort(stable=True)]


def _add_outputs(
    out: Tensor,
    parts: LayerParts,
    routed: tuple[Tensor, Tensor, Tensor],
    choice: Tensor,
    neurons: slice,
    keep: Tensor | None = None,
) -> None:
    """Add weight x output of some neurons of each choice [S], sorted by expert, to its token's row of out.

    routed: x [T, d], index, weight [T, k]; keep [S, N]: blocks whose neurons count.
    """
    (x, index, weight), layer = routed, parts.layer
    token, expert = choice // index.shape[1], index.reshape(-1)[choice]
    count = torch.bincount(expert, minlength=layer.num_experts)

    def product(rows: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """rows [S, a] times each expert's matrix [E, b, a]."""
        found = _products(rows, matrix, count)
        return found if bias is None else found + bias[:, neurons][expert].to(found.dtype)

    rows = x[token]
    gate = None if layer.gate is None else product(rows, layer.gate[:, neurons], layer.gate_bias)
    a = layer.activate(gate, product(rows, layer.up[:, neurons], layer.up_bias))
    if keep is not None:
        a = a * keep.repeat_interleave(parts.block, 1)
    y = product(a, layer.down[:, :, neurons]) * weight.reshape(-1)[choice, None]
    out.index_add_(0, token, y.float())


def _products(rows: Tensor, matrix: Tensor, count: Tensor) -> Tensor:
    """[S, b]: rows [S, a], sorted by expert, times the expert's matrix of [E, b, a]. count [E]: rows of each."""
    if matrix.dtype != rows.dtype:  # one expert at a time: a copy of all would be as large as the layer
        parts = zip(torch.split(rows, count.tolist()), matrix, strict=True)
        return torch.cat([own @ m.to(rows.dtype).T for own, m in parts if len(own)] or [rows.new_empty(0, matrix.shape[1])])
    if 1 not in matrix.stride()[1:]:  # stored otherwise than torch multiplies: copy what is asked for
        active = count.nonzero()[:, 0]
        matrix, count = matrix[active].contiguous(), count[active]
    aligned = all(step == 1 or step * rows.element_size() % 16 == 0 for step in (*matrix.stride(), *rows.stride()))
    if rows.dtype in GROUPED_DTYPES and aligned:
        return torch.nn.functional.grouped_mm(rows, matrix.transpose(1, 2), offs=count.cumsum(0, dtype=torch.int32))
    active = count.nonzero()[:, 0]
    first = count.cumsum(0) - count
    group = torch.repeat_interleave(torch.arange(len(active), device=rows.device), count[active])
    place = torch.arange(len(rows), device=rows.device) - first[active][group]
    padded = rows.new_zeros(len(active), int(count.max()), rows.shape[1])
    padded[group, place] = rows
    return torch.bmm(padded, matrix[active].transpose(1, 2))[group, place]


def _with_bias(parts: LayerParts, out: Tensor, index: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """Add the output bias of every expert that keeps a block."""
    if parts.layer.down_bias is None:
        return out
    bias = parts.layer.down_bias[index.clamp(0, parts.layer.num_experts - 1)]
    return out + (bias * (weight * keep.any(2))[:, :, None]).float().sum(1)
