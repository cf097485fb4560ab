"""Run a benchmark as a processor with narrower vectors would: the script starts itself again with the libraries' switches set."""

from __future__ import annotations

import os
import sys

SWITCHES: dict[str, dict[str, str]] = {
    "avx512": {},
    "avx2": {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+64bit,+cx16,+sahf,+popcnt,+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "sse": {
        "NUMBA_CPU_NAME": "x86-64-v2",
        "NUMBA_CPU_FEATURES": "+64bit,+cx16,+sahf,+popcnt,+sse4.2",
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}


def runs_here(isa: str) -> bool:
    """Whether this processor has the instructions."""
    from llvmlite.binding import get_host_cpu_features

    has = get_host_cpu_features()
    wanted = {"avx512": ("avx512f", "avx512vl"), "avx2": ("avx2", "fma", "f16c"), "sse": ("sse4.2",)}[isa]
    return all(has.get(name) for name in wanted)


def run_as(isa: str | None) -> None:
    """Become the same command with the switches of `isa` set; returns at once where they are."""
    switches = SWITCHES[isa] if isa else {}
    if any(os.environ.get(name) != value for name, value in switches.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **switches})  # noqa: S606 - this very command
