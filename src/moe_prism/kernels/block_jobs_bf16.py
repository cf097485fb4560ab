"""The two jobs of `block_jobs.py` over bfloat16 weights. Not part of it so that nobody compiles what he does not use."""

from __future__ import annotations

import numpy as np
from numba import cfunc

from .block_jobs import JOB, add_units, dot_units


@cfunc(JOB, cache=True)
def dot_job(job: int) -> None:
    """`dot_units` over bfloat16 weights."""
    dot_units(job, np.uint16(0))


@cfunc(JOB, cache=True)
def add_job(job: int) -> None:
    """`add_units` over bfloat16 weights."""
    add_units(job, np.uint16(0))
