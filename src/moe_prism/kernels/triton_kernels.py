"""The Triton kernels. Nothing but `triton_run` imports this file, so the rest of the package works where Triton is not installed.

One program computes one tile of slots times one tile of output columns and reads the weights of that sub-expert where they lie. Every
sum runs over one axis in one order in float32 (float32 inputs are multiplied exactly, without TF32). Programs of tiles that the
list does not use return at once. Weights are numbers (GROUP 0), or lie in planes of four bits (`plane_tiles.py`) and become numbers in
registers: a weight is (code with its unread bits cleared x UNIT + OFFSET) x the scale of GROUP inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: the kernels run in Python on CPU tensors


@triton.jit
def _activate(g: tl.tensor, ACT: tl.constexpr) -> tl.tensor:
    if ACT == "gelu":
        return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    if ACT == "gelu_tanh":  # 0.5 (1 + tanh(z)) = 1 / (1 + exp(-2 z))
        return g / (1.0 + tl.exp(-1.5957691216057308 * (g + 0.044715 * g * g * g)))
    return g / (1.0 + tl.exp(-g))  # silu


@triton.jit
def _from_planes(
    tiles: tl.tensor,  # uint8: of a block [outputs / 16, scales | upper plane | lower plane]
    output: tl.tensor,
    k: tl.tensor,
    inside: tl.tensor,
    BYTES: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    BOTH: tl.constexpr,
    MASK: tl.constexpr,
    UNIT: tl.constexpr,
    OFFSET: tl.constexpr,
) -> tl.tensor:
    tile = tiles + (output // 16).to(tl.int64) * BYTES
    place = tile + 32 * (INPUTS // GROUP) + (k // 8) * 64 + (output % 16) * 4 + k % 4
    shift = (k // 4) % 2 * 4
    code = (tl.load(place, mask=inside, other=0).to(tl.int32) >> shift) & 15
    if BOTH:
        lower = (tl.load(place + 8 * INPUTS, mask=inside, other=0).to(tl.int32) >> shift) & 15
        code = code * 16 + lower
    at = tile + (k // GROUP) * 32 + (output % 16) * 2
    low = tl.load(at, mask=inside, other=0).to(tl.int32)
    high = tl.load(at + 1, mask=inside, other=0).to(tl.int32)
    scale = ((high << 24) | (low << 16)).to(tl.float32, bitcast=True)
    return ((code & MASK).to(tl.float32) * UNIT + OFFSET) * scale


# `gate_up` and `down` keep more than six parameters: Triton compiles a kernel for its tensors, strides and constants, and takes no objects.


@triton.jit
def gate_up(
    x: tl.tensor,  # [T, d]
    gate: tl.tensor,  # [E, f, d], any strides
    up: tl.tensor,  # [E, f, d], the same strides
    a: tl.tensor,  # out [S, block]: activations in sorted slot order
    slots: tl.tensor,
    tile_group: tl.tensor,
    tile_first: tl.tensor,
    tile_end: tl.tensor,
    x_row: tl.tensor,
    x_col: tl.tensor,
    w_expert: tl.tensor,
    w_row: tl.tensor,
    w_col: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    N_SUB: tl.constexpr,
    PER_TOKEN: tl.constexpr,  # slots per token, k N
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr = 0,
    BYTES: tl.constexpr = 0,
    BOTH: tl.constexpr = False,
    MASK: tl.constexpr = 0,
    UNIT: tl.constexpr = 1.0,
    OFFSET: tl.constexpr = 0.0,
) -> None:
    across: tl.constexpr = (BLOCK + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // across
    group = tl.load(tile_group + tile)
    if group < 0:
        return
    position = tl.load(tile_first + tile) + tl.arange(0, ROWS)
    live = position < tl.load(tile_end + tile)
    token = (tl.load(slots + position, mask=live, other=0) // PER_TOKEN).to(tl.int64)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < BLOCK
    neuron = (group % N_SUB) * BLOCK + column
    weights = (group // N_SUB).to(tl.int64) * w_expert + neuron.to(tl.int64) * w_row
    depth = tl.arange(0, DEPTH)
    g = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    u = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for start in range(0, D, DEPTH):
        k = start + depth
        in_x = live[:, None] & (k < D)[None, :]
        in_w = inside[None, :] & (k < D)[:, None]
        left = tl.load(x + token[:, None] * x_row + k[None, :] * x_col, mask=in_x, other=0.0)
        if GROUP:
            block = group.to(tl.int64) * (BLOCK // 16) * BYTES
            of_gate = _from_planes(gate + block, column[None, :], k[:, None], in_w, BYTES, D, GROUP, BOTH, MASK, UNIT, OFFSET)
            of_up = _from_planes(up + block, column[None, :], k[:, None], in_w, BYTES, D, GROUP, BOTH, MASK, UNIT, OFFSET)
        else:
            where = weights[None, :] + k[:, None] * w_col
            of_gate = tl.load(gate + where, mask=in_w, other=0.0)
            of_up = tl.load(up + where, mask=in_w, other=0.0)
        g = tl.dot(left, of_gate.to(left.dtype), g, input_precision="ieee")
        u = tl.dot(left, of_up.to(left.dtype), u, input_precision="ieee")
    out = (_activate(g, ACT) * u).to(a.dtype.element_ty)
    tl.store(a + position.to(tl.int64)[:, None] * BLOCK + column[None, :], out, mask=live[:, None] & inside[None, :])


@triton.jit
def down(
    a: tl.tensor,  # [S, block]
    weight: tl.tensor,  # [E, d, f], any strides
    routing: tl.tensor,  # [T k]
    out: tl.tensor,  # float32: [S, d] rows in slot order, or with ATOMIC [T, d] sums that begin at zero
    slots: tl.tensor,
    tile_group: tl.tensor,
    tile_first: tl.tensor,
    tile_end: tl.tensor,
    w_expert: tl.tensor,
    w_row: tl.tensor,
    w_col: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    N_SUB: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ATOMIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr = 0,
    BYTES: tl.constexpr = 0,
    BOTH: tl.constexpr = False,
    MASK: tl.constexpr = 0,
    UNIT: tl.constexpr = 1.0,
    OFFSET: tl.constexpr = 0.0,
) -> None:
    across: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // across
    group = tl.load(tile_group + tile)
    if group < 0:
        return
    position = tl.load(tile_first + tile) + tl.arange(0, ROWS)
    live = position < tl.load(tile_end + tile)
    slot = tl.load(slots + position, mask=live, other=0)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < D
    weights = (group // N_SUB).to(tl.int64) * w_expert + column.to(tl.int64) * w_row
    first = (group % N_SUB) * BLOCK
    depth = tl.arange(0, DEPTH)
    y = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for start in range(0, BLOCK, DEPTH):
        k = start + depth
        in_a = live[:, None] & (k < BLOCK)[None, :]
        in_w = inside[None, :] & (k < BLOCK)[:, None]
        left = tl.load(a + position.to(tl.int64)[:, None] * BLOCK + k[None, :], mask=in_a, other=0.0)
        if GROUP:
            block = group.to(tl.int64) * (D // 16) * BYTES
            right = _from_planes(weight + block, column[None, :], k[:, None], in_w, BYTES, BLOCK, GROUP, BOTH, MASK, UNIT, OFFSET)
        else:
            right = tl.load(weight + weights[None, :] + (first + k).to(tl.int64)[:, None] * w_col, mask=in_w, other=0.0)
        y = tl.dot(left, right.to(left.dtype), y, input_precision="ieee")
    y = y * tl.load(routing + slot // N_SUB, mask=live, other=0.0).to(tl.float32)[:, None]
    in_y = live[:, None] & inside[None, :]
    if ATOMIC:
        token = (slot // PER_TOKEN).to(tl.int64)
        tl.atomic_add(out + token[:, None] * D + column[None, :], y, mask=in_y, sem="relaxed")
    else:
        tl.store(out + slot.to(tl.int64)[:, None] * D + column[None, :], y, mask=in_y)


@triton.jit
def combine(
    rows: tl.tensor,  # [S, d] float32, undefined where a slot is dropped
    keep: tl.tensor,  # [S] uint8, 0 or 1
    out: tl.tensor,  # [T, d]
    D: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    across: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    token = (tl.program_id(0) // across).to(tl.int64)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.full((COLUMNS,), 0.0, tl.float32)
    for j in range(PER_TOKEN):
        slot = token * PER_TOKEN + j
        width = tl.load(keep + slot).to(tl.int32) * D  # a dropped slot has no columns
        total += tl.load(rows + slot * D + column, mask=column < width, other=0.0)
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=column < D)
