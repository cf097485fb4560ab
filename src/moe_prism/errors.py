"""Every error a user can meet. Each says the cause and the next step in one line, and carries the command's exit code.

PrismError            1   failed
├── UsageError        2   bad argument, path, recipe or model
├── DoesNotFit        3   this machine cannot do it
└── CorruptError      4   data or output failed verification
"""

from __future__ import annotations


class PrismError(Exception):
    """A failure that is explained: `cause` (what is wrong) and `next_step` (what to do about it)."""

    exit_code = 1

    def __init__(self, cause: str, next_step: str = "") -> None:
        self.cause, self.next_step = cause, next_step
        super().__init__(f"{cause}; {next_step}" if next_step else cause)


class UsageError(PrismError):
    """The request cannot be met as it was written."""

    exit_code = 2


class DoesNotFit(PrismError):
    """The job needs more memory or disk than there is."""

    exit_code = 3


class CorruptError(PrismError):
    """Files are damaged, incomplete or hold values that must not be used."""

    exit_code = 4


def memory_ran_out(error: BaseException) -> bool:
    """Whether it is what Python, NumPy, torch on a CPU or torch on a GPU raise then; torch has no class of its own for a CPU."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
