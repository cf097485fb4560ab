"""Every error a user can meet. Each says the cause and the next step in one line, and carries the command's exit code.

PrismError            1   failed
├── UsageError        2   bad argument, path, recipe or model
├── DoesNotFit        3   this machine cannot do it
└── CorruptError      4   data or output failed verification
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class PrismError(Exception):
    """A failure that is explained: `cause` (what is wrong) and `next_step` (what to do about it).

    >>> import moe_prism
    >>> try:
    ...     moe_prism.load("missing")
    ... except moe_prism.PrismError as error:
    ...     print(error.next_step, error.exit_code)
    give a folder that `moe-prism refactor MODEL -o FOLDER` wrote 2
    """

    exit_code = 1

    def __init__(self, cause: str, next_step: str = "") -> None:
        self.cause, self.next_step = cause, next_step
        super().__init__(f"{cause}; {next_step}" if next_step else cause)


class UsageError(PrismError):
    """The request cannot be met as it was written.

    >>> import moe_prism
    >>> moe_prism.RefactorOptions(n_sub=1).check()
    Traceback (most recent call last):
    moe_prism.errors.UsageError: --n-sub 1 is too small; give at least 2
    """

    exit_code = 2


class DoesNotFit(PrismError):
    """The job needs more memory or disk than there is. needed: all that it needs, where that was worked out.

    >>> import moe_prism
    >>> moe_prism.forecast_offload("elastic", 1000)
    Traceback (most recent call last):
    moe_prism.errors.DoesNotFit: ...
    """

    exit_code = 3

    def __init__(self, cause: str, next_step: str = "", needed: Mapping[str, Any] | None = None) -> None:
        super().__init__(cause, next_step)
        self.needed = needed


class CorruptError(PrismError):
    """Files are damaged, incomplete or hold values that must not be used.

    >>> import moe_prism, pathlib
    >>> _ = pathlib.Path("frontier.json").write_text("{")
    >>> moe_prism.Frontier.load("frontier.json")
    Traceback (most recent call last):
    moe_prism.errors.CorruptError: ...
    """

    exit_code = 4


def memory_ran_out(error: BaseException) -> bool:
    """Whether it is what Python, NumPy, torch on a CPU or torch on a GPU raise then; torch has no class of its own for a CPU."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
