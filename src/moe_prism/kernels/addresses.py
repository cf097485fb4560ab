"""Arrays over memory that a compiled function is given by address: numba takes a number in no time, and an array in a microsecond."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray


@intrinsic
def pointer(context: Any, address: Any) -> Any:
    """What `carray` takes, of an address."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.intp), codegen


@njit(nogil=True, cache=True)
def floats(address: int, rows: int, columns: int) -> NDArray[np.float32]:
    """[rows, columns]."""
    return carray(pointer(address), (rows, columns), np.float32)  # type: ignore[no-any-return]


@njit(nogil=True, cache=True)
def floats_3d(address: int, first: int, rows: int, columns: int) -> NDArray[np.float32]:
    """[first, rows, columns]."""
    return carray(pointer(address), (first, rows, columns), np.float32)  # type: ignore[no-any-return]


@njit(nogil=True, cache=True)
def numbers(address: int, rows: int, columns: int) -> NDArray[np.int64]:
    """[rows, columns]."""
    return carray(pointer(address), (rows, columns), np.int64)  # type: ignore[no-any-return]


@njit(nogil=True, cache=True)
def flags(address: int, first: int, rows: int, columns: int) -> NDArray[np.bool_]:
    """[first, rows, columns]."""
    return carray(pointer(address), (first, rows, columns), np.bool_)  # type: ignore[no-any-return]


@intrinsic
def call(context: Any, function: Any, argument: Any) -> Any:
    """function(argument), by the address of a job (`block_jobs.JOB`): it is compiled once, wherever it is called."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), [values[1]])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@intrinsic
def fork(context: Any, entry: Any, function: Any, argument: Any, threads: Any) -> Any:
    """GOMP_parallel(function, argument, threads, 0), by the address of that entry point (`threads.py`)."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, byte, word, word])
        called = builder.inttoptr(values[0], kind.as_pointer())
        function, argument = (builder.inttoptr(v, byte) for v in values[1:3])
        builder.call(called, [function, argument, builder.trunc(values[3], word), ir.Constant(word, 0)])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp), codegen
