"""Products of the rows of a batch with the blocks of weights that each row asks for, by the compiled block_jobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import block_jobs, threads
from ...kernels.activation import silu_job
from ...kernels.block_jobs import group
from ...kernels.tiles import LANES
from ...model import MoELayer
from ..base import LayerParts

SILU = 32  # multiplications that an activation takes as long as
ALIGN = 64  # columns: strips of an output row end on a cache line


class Matrix(NamedTuple):
    """Where a weight [E, rows, depth] lies, its last dimension contiguous: address, and strides in elements. `tensor` keeps it alive."""

    address: int
    expert: int
    row: int
    tensor: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Matrix:
        return cls(tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor)


class MatrixPart(NamedTuple):
    """Rows `start`, start + `jump`, ... of every block of `matrix` give columns `column`, column + `step`, ... of a result."""

    matrix: Matrix
    column: int
    start: int = 0
    step: int = 1
    jump: int = 1

    def cells(self, block: int) -> list[int]:
        """As `block_jobs.dot_units` reads it. block: rows of a sub-expert."""
        m = self.matrix
        first = m.address + m.tensor.element_size() * self.start * m.row
        return [first, m.expert, block * m.row, self.jump * m.row, self.column, self.step]


@dataclass(frozen=True)
class Stored:
    """A layer's weights as the jobs take them, until they move: `key` is `MoELayer.storage()` of that time."""

    key: tuple[int, ...]
    first: tuple[MatrixPart, ...]  # gate and up, or up alone, [E, f, d], one block's pre-activations beside the other's
    down: Matrix  # [E, f, d]
    ready: bool  # float32 or bfloat16 on a CPU, neuron by neuron, rows of whole vectors

    @classmethod
    def of(cls, parts: LayerParts) -> Stored:
        """The weights of a layer as they lie now; found once, and again after they have moved."""
        layer, key = parts.layer, parts.layer.storage()
        if parts.stored is None or parts.stored.key != key:
            rows = [w.detach() for w in (layer.gate, layer.up, layer.down.transpose(1, 2)) if w is not None]
            ready = layer.hidden % LANES == 0
            ready &= all(w.device.type == "cpu" and w.dtype == rows[0].dtype and w.stride(2) == 1 for w in rows)
            ready &= rows[0].dtype in (torch.float32, torch.bfloat16)
            *first, down = map(Matrix.of, rows)
            parts.stored = cls(key, tuple(MatrixPart(m, i * parts.block) for i, m in enumerate(first)), down, ready)
        return parts.stored  # type: ignore[no-any-return]


def usable(parts: LayerParts, x: Tensor) -> Stored | None:
    """The weights, if the jobs can take them and rows x: stored as `MoELayer.arrange` leaves them, and nobody asks for gradients."""
    stored = Stored.of(parts)
    if not (stored.ready and x.dtype == torch.float32 and x.device.type == "cpu" and threads.can_share()):
        return None
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or parts.layer.up.requires_grad)
    return None if needs_gradient else stored


class Span(NamedTuple):
    """Active groups first..last - 1, whose slots are begin..end - 1."""

    first: int
    last: int
    begin: int
    end: int


class SlotGroups(NamedTuple):
    """Slots sorted by sub-expert, then token. row, choice [S]; offset [E N + 1]; active: the groups that have slots."""

    row: Tensor
    choice: Tensor
    offset: Tensor
    active: Tensor
    n_sub: int
    distinct: bool

    @classmethod
    def of(cls, index: Tensor, keep: Tensor, experts: int) -> SlotGroups:
        """index [T, k], keep [T, k, N] bool. `distinct`: no token has an expert twice."""
        row, choice, offset, active, distinct = group(index.contiguous().numpy(), keep.contiguous().numpy(), experts)
        whole = torch.from_numpy
        return cls(whole(row), whole(choice), whole(offset), whole(active), keep.shape[2], distinct)

    @property
    def all(self) -> Span:
        return Span(0, len(self.active), 0, len(self.row))

    def spans(self, limit: int) -> Iterator[Span]:
        """Runs of at most `limit` slots, or of one group."""
        if len(self.row) <= limit:
            yield self.all
            return
        ends = self.offset[self.active + 1].tolist()
        first, begin = 0, 0
        for at, end in enumerate(ends, 1):
            if at == len(ends) or ends[at] - begin > limit:
                yield Span(first, at, begin, end)
                first, begin = at, end


class Columns(NamedTuple):
    """Columns of a product: `each` of every part, and how many rows of a matrix one sub-expert takes up."""

    parts: Sequence[MatrixPart]
    block: int
    each: int


def dot(x: Tensor, groups: SlotGroups, span: Span, wanted: Columns, out: Tensor, target: Tensor) -> None:
    """out[target[s], part.column + j * part.step] = x[row[s]] . matrix[expert, n * block + part.start + j * part.jump], j < each.

    For the slots s of a span (target counts from its first one). x [T, d], out [*, *]: float32, contiguous rows.
    """
    parts, block, columns = wanted
    values = [x.data_ptr(), x.stride(0), x.shape[1], out.data_ptr(), out.stride(0), groups.row.data_ptr()]
    values += [target.data_ptr() - 8 * span.begin, groups.offset.data_ptr(), groups.active.data_ptr(), span.first, span.last]
    values += [groups.n_sub, columns, len(parts)]
    for p in parts:
        values += p.cells(block)
    threads.run(_job(parts[0].matrix, "dot_job"), values, (span.end - span.begin) * columns * x.shape[1] * len(parts))


def add(a: Tensor, groups: SlotGroups, span: Span, down: Matrix, out: Tensor) -> None:
    """out[row[s]] += sum over j of a[s, j] down[expert, n * m + j] for the slots s of a span. a [S, m] counts from its first one."""
    depth, width = a.shape[1], out.shape[1]
    work = len(a) * depth * width
    strip = width if work < threads.ONE_THREAD_WORK else -(-width // (ALIGN * torch.get_num_threads())) * ALIGN
    values = [a.data_ptr(), a.stride(0), depth, out.data_ptr(), out.stride(0), groups.row.data_ptr(), groups.offset.data_ptr()]
    values += [
        groups.active.data_ptr(),
        span.first,
        span.last,
        groups.n_sub,
        down.address,
        down.expert,
        depth * down.row,
        down.row,
    ]
    threads.run(_job(down, "add_job"), [*values, width, strip, span.begin], work)


def activated(layer: MoELayer, pre: Tensor, factor: Tensor | None = None, choice: Tensor | None = None) -> Tensor:
    """The activation [S, m] of rows pre [S, 2m or m], multiplied by factor[choice] [S] if they are given."""
    if not layer.is_silu or not pre.is_contiguous():
        a = layer.activate_joined(pre)
        return a if factor is None else a.mul_(factor[choice].unsqueeze(1))
    slots, width = len(pre), pre.shape[1] // 2
    out = torch.empty(slots, width)
    weights, ids = (0, 0) if factor is None or choice is None else (factor.data_ptr(), choice.data_ptr())
    values = [pre.data_ptr(), 2 * width, width, slots, weights, ids, out.data_ptr(), width]
    threads.run(silu_job, values, slots * width * SILU)
    return out


def _job(matrix: Matrix, name: str) -> Any:
    """The job for weights of this dtype; all matrices of a call have the same."""
    if matrix.tensor.dtype == torch.float32:
        return getattr(block_jobs, name)
    from ...kernels import block_jobs_bf16  # compiles on first use

    return getattr(block_jobs_bf16, name)
