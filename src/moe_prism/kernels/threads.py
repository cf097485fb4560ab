"""Run a compiled job on torch's own threads.

A second pool (numba's, or Python threads) would fight with the one torch keeps: its OpenMP threads stay awake for milliseconds after every
operation, waiting for the next. So the job is handed to that pool, through the entry point that every OpenMP program calls.
"""

from __future__ import annotations

import ctypes
from array import array
from functools import cache
from typing import Any

import torch

ONE_THREAD_WORK = 1 << 21  # multiplications that are over before a second thread has woken up


@cache
def _fork() -> Any:
    """GOMP_parallel(function, argument, threads, flags) of the OpenMP library that torch has loaded, or None."""
    try:
        found = ctypes.CDLL("libgomp.so.1").GOMP_parallel
    except (OSError, AttributeError):
        return None
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return found


@cache
def fork_address() -> int:
    """Of GOMP_parallel, for compiled functions that share out their work themselves; 0 where it is not there."""
    found = _fork()
    return 0 if found is None else ctypes.cast(found, ctypes.c_void_p).value or 0


def can_share() -> bool:
    """Whether jobs can use as many threads as torch does."""
    return torch.get_num_threads() == 1 or _fork() is not None


@cache
def _direct(job: Any) -> Any:
    """The job as a Python function; numba makes a new one at every access."""
    return job.ctypes


def run(job: Any, values: list[int], work: int) -> None:
    """Run a numba cfunc over a job array: the unit counter, then `values`. work: multiplications in all.

    The memory that `values` point into must be kept alive by the caller.
    """
    numbers = array("q", [0, *values])
    address, _ = numbers.buffer_info()
    threads = 1 if work < ONE_THREAD_WORK else torch.get_num_threads()
    if threads == 1:
        _direct(job)(address)
    else:
        # Returns when all threads have: it ends with a barrier, so `numbers` lives for as long as they read it. Other threads of Python can
        # run meanwhile, since ctypes gives the interpreter's lock back for the call.
        _fork()(job.address, address, threads, 0)
