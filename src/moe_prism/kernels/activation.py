"""The activation of gated experts, silu(gate) x up, in vector code: the same bits for a value wherever it lies, and whoever computes it.

Torch's own takes three calls and two passes more, which is most of the time of a layer with few tokens. Strides are elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cfunc, njit, types
from numba.extending import intrinsic

from .block_jobs import JOB
from .target import TARGET
from .tiles import LANES, read, take
from .vector_code import F32, Code, constant

ROWS = 64  # rows of a unit of the job


def _silu_times(c: Code, gate: Any, up: Any, factor: Any, out: Any) -> None:
    """One vector of out = silu(gate) x up x factor, by address."""
    b = c.b
    value = c.load(gate)
    denominator = b.fadd(c.every(1.0), c.exp(b.fneg(value)))
    c.store(b.fmul(b.fmul(b.fdiv(value, denominator), c.load(up)), c.spread(factor)), out)


@intrinsic
def silu_times(context: Any, gate: Any, up: Any, count: Any, factor: Any, out: Any) -> Any:
    """out[i] = silu(gate[i]) x up[i] x factor, i < count, all float32 at addresses; out may be where gate or up is."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        gate, up, count, factor, out = values
        whole = builder.udiv(count, constant(LANES))
        done = builder.mul(whole, constant(LANES))
        for lanes, first, number in ((LANES, constant(0), whole), (1, done, builder.sub(count, done))):
            code = Code(builder, lanes, fused=TARGET.fused)
            with builder.if_then(builder.icmp_signed(">", number, constant(0))):

                def step(i: Any, _: list[Any], code: Code = code, first: Any = first) -> list[Any]:
                    at = builder.add(first, builder.mul(i, constant(code.lanes)))
                    _silu_times(code, code.at(gate, at), code.at(up, at), factor, code.at(out, at))
                    return []

                code.loop(number, [], step)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.float32, types.intp), codegen


@intrinsic
def read_float(context: Any, address: Any, i: Any) -> Any:
    """The i-th float32 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        code = Code(builder, 1)
        return code.load(code.at(values[0], values[1]), F32)

    return types.float32(types.intp, types.intp), codegen


@njit(nogil=True, cache=True)
def silu_units(job: int) -> None:
    """out[s] = silu(pre[s, :m]) x pre[s, m:2m] x factor[ids[s]] for rows s; a unit is ROWS rows.

    job: unit counter, pre, its row stride, m, rows, factor (0: all one), ids, out, its row stride.
    """
    pre, ldp, width, rows = read(job, 1), read(job, 2), read(job, 3), read(job, 4)
    factor, ids, out, ldo = read(job, 5), read(job, 6), read(job, 7), read(job, 8)
    unit = take(job)
    while unit * ROWS < rows:
        for s in range(unit * ROWS, min(rows, unit * ROWS + ROWS)):
            own = read_float(factor, read(ids, s)) if factor != 0 else np.float32(1)
            gate = pre + 4 * s * ldp
            silu_times(gate, gate + 4 * width, width, own, out + 4 * s * ldo)
        unit = take(job)


@cfunc(JOB, cache=True)
def silu_job(job: int) -> None:
    """`silu_units` as a job."""
    silu_units(job)
