"""The fast executor of a CPU: kept slots sorted by sub-expert, products by the tiles of `tiles.py`, activations by torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import team
from .base import LayerPlan
from .jobs import add_job, dot_job, group, log_norms
from .tiles import LANES

CEILING = 30.0  # of a predicted log norm: no overflow on inputs far from the sample
PIECE = 1 << 20  # pre-activations computed before they are used, so that they are still in the cache then


def fits(plan: LayerPlan, x: Tensor) -> bool:
    """Whether `tiled` can run this layer: float32 on a CPU with fused multiply-add, stored as `MoELayer.arrange` does, no gradients."""
    layer = plan.layer
    up, down = layer.up, layer.down
    return (
        LANES > 0
        and up.dtype == x.dtype == torch.float32
        and up.device.type == x.device.type == "cpu"
        and layer.hidden % LANES == 0
        and up.stride(2) == 1
        and down.stride(1) == 1
        and not (torch.is_grad_enabled() and (x.requires_grad or up.requires_grad))
        and team.can_share()
    )


def tiled(plan: LayerPlan, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor) -> Tensor | None:
    """As `execute.reference`. None if a token has one expert twice: then two slots of a group would write to the same row."""
    layer = plan.layer
    groups = Groups.of(index, keep, layer.num_experts)
    if not groups.distinct:
        return None
    x, up, gate = _rows(x), layer.up, layer.gate
    parts = [Part(up, 0)] if gate is None else [Part(gate, 0), Part(up, plan.block)]
    factor = weight.reshape(-1)[groups.choice][:, None]
    slot = torch.arange(len(groups.row))
    width = len(parts) * plan.block
    out = torch.zeros_like(x)
    for first, last, begin, end in groups.spans(PIECE // width):
        pre = torch.empty(end - begin, width)
        dot(x, groups, parts, plan.block, pre, slot[: end - begin], (first, last))
        if layer.up_bias is not None:
            pre += _biases(plan, groups, first, last)
        a = layer.activate_joined(pre).mul_(factor[begin:end])
        add(a, groups, layer.down, out, (first, last))
    if layer.down_bias is not None:
        out += torch.einsum("tk,tkd->td", weight * keep.any(2), layer.down_bias[index.clamp(0, layer.num_experts - 1)])
    return out


@dataclass(frozen=True)
class Part:
    """weight [E, rows, depth], contiguous rows; a block's first row gives `column` of the result, the next one column + step."""

    weight: Tensor
    column: int
    step: int = 1


@dataclass(frozen=True)
class Groups:
    """Slots sorted by sub-expert, then token. row, choice [S]; offset [E N + 1]; active: the groups that have slots."""

    row: Tensor
    choice: Tensor
    offset: Tensor
    active: Tensor
    n_sub: int
    distinct: bool

    @classmethod
    def of(cls, index: Tensor, keep: Tensor, experts: int) -> Groups:
        """index [T, k], keep [T, k, N] bool."""
        *arrays, distinct = group(index.contiguous().numpy(), keep.contiguous().numpy(), experts)
        row, choice, offset, active = (torch.from_numpy(a) for a in arrays)
        return cls(row, choice, offset, active, keep.shape[2], bool(distinct))

    def spans(self, limit: int) -> Iterator[tuple[int, int, int, int]]:
        """(first, last active group, first, last slot) of runs of at most `limit` slots, or of one group."""
        slots = len(self.row)
        if slots <= limit:
            yield 0, len(self.active), 0, slots
            return
        ends = self.offset[self.active + 1].tolist()
        first, begin = 0, 0
        for at, end in enumerate(ends):
            if at + 1 == len(ends) or ends[at + 1] - begin > limit:
                yield first, at + 1, begin, end
                first, begin = at + 1, end


def dot(
    x: Tensor, groups: Groups, parts: Sequence[Part], columns: int, out: Tensor, target: Tensor, span: tuple[int, int]
) -> None:
    """out[target[s], part.column + j * part.step] = x[row[s]] . part.weight[expert, block * columns + j].

    For the slots s of the active groups in `span` (counted from the first of them), every part, and every j < columns. x [T, d].
    """
    first, last = span
    begin = int(groups.offset[groups.active[first]]) if first else 0
    values = [x.data_ptr(), x.stride(0), x.shape[1], out.data_ptr(), out.stride(0), groups.row.data_ptr()]
    values += [target.data_ptr() - 8 * begin, groups.offset.data_ptr(), groups.active.data_ptr(), first, last]
    values += [groups.n_sub, columns, len(parts)]
    for part in parts:
        expert, row, _ = part.weight.stride()
        values += [part.weight.data_ptr(), expert, columns * row, row, part.column, part.step]
    team.run(dot_job, values, out.shape[0] * columns * x.shape[1] * len(parts))


def add(a: Tensor, groups: Groups, down: Tensor, out: Tensor, span: tuple[int, int]) -> None:
    """out[row[s]] += sum over j of a[s, j] down[expert, :, block * m + j] for the slots s of the span. a [S, m], down [E, d, f]."""
    first, last = span
    begin = int(groups.offset[groups.active[first]]) if first else 0
    expert, _, neuron = down.stride()
    depth, width = a.shape[1], out.shape[1]
    strip = -(-width // torch.get_num_threads() // 64) * 64 if len(a) * depth * width >= team.SMALL else width
    values = [a.data_ptr(), a.stride(0), depth, out.data_ptr(), out.stride(0), groups.row.data_ptr(), groups.offset.data_ptr()]
    values += [groups.active.data_ptr(), first, last, groups.n_sub, down.data_ptr(), expert, depth * neuron, neuron]
    team.run(add_job, [*values, width, strip, begin], len(a) * depth * width)


def predict(plan: LayerPlan, weight: Tensor, scale: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """The ridge predictor: norms [T, k, N] of rows x [T, d] and choices [T, k]. weight [E, N, d + N r + 1], scale [E, N, r]."""
    layer, n, r = plan.layer, plan.n_sub, plan.gates
    groups = Groups.of(index, torch.ones(*index.shape, 1, dtype=torch.bool), layer.num_experts)
    parts, split = [Part(weight, 0)], n
    for i in range(r):
        if layer.gate is not None:
            parts.append(Part(layer.gate[:, i :: plan.block], n + i, r))
            split = n + n * r
        parts.append(Part(layer.up[:, i :: plan.block], split + i, r))
    products = torch.empty(index.numel(), split + n * r)
    dot(_rows(x), groups, parts, n, products, groups.choice, (0, len(groups.active)))
    gates = layer.activate_joined(products[:, n:]) if r else products[:, :0]
    norms = torch.empty(*index.shape, n)
    log_norms(products.numpy(), gates.numpy(), scale.view(-1, n * r).numpy(), weight.numpy(), index.numpy(), norms.numpy())
    return norms.clamp_(max=CEILING).exp_()


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _biases(plan: LayerPlan, groups: Groups, first: int, last: int) -> Tensor:
    """[S, width]: the first biases of the slots of a span."""
    layer, active = plan.layer, groups.active[first:last]
    halves: list[Any] = [b for b in (layer.gate_bias, layer.up_bias) if b is not None]
    table = torch.cat([b.reshape(-1, plan.block) for b in halves], 1)[active]
    return table.repeat_interleave(groups.offset[active + 1] - groups.offset[active], 0)
