"""What the vector code is made for: lanes and registers of the instruction set that numba compiles to.

numba's own settings decide, `NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES`, and what it finds on this machine where they are not set. So
the narrow forms can be compiled, run and timed on a wide machine. numba keeps what it compiles for each target apart.
"""

from __future__ import annotations

from typing import NamedTuple

from numba.core.registry import cpu_target


class InstructionSet(NamedTuple):
    """An instruction set. lanes: float32 values of a vector register; registers: how many there are; fused: multiplies and adds in one."""

    name: str
    lanes: int
    registers: int
    fused: bool


AVX512 = InstructionSet("avx512", 16, 32, True)
AVX2 = InstructionSet("avx2", 8, 16, True)
SSE = InstructionSet("sse", 4, 16, False)
NEON = InstructionSet("neon", 4, 32, True)


def target_of(triple: str, features: str) -> InstructionSet:
    """The target of an LLVM triple and its features ("+avx2,-avx512f"); 128 bits where nothing wider is named."""
    if triple.startswith(("aarch64", "arm64")):
        return NEON
    on = set(features.split(","))
    if {"+avx512f", "+avx512vl"} <= on:
        return AVX512
    return AVX2 if {"+avx2", "+fma"} <= on else SSE


def _here() -> InstructionSet:
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return target_of(triple, features)


TARGET = _here()
"""What numba compiles to in this process."""
