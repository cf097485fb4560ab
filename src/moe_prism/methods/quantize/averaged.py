"""What methods share that spend a mean number of bits on what differs: experts, or neurons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ...errors import UsageError
from ..base import Method

AVERAGES = 2.75, 2.5, 2.25, 2.0, 1.75


class AveragedBits(Method):
    """`NAME:2.5`, or `NAME:bits=2.5` with more parameters; without a mean one point for each of AVERAGES."""

    acts: ClassVar[str] = "weights"

    @classmethod
    def set_by(cls, name: str, parameter: str) -> str:
        return f"{name}:{parameter}={parameter.upper()}"

    @classmethod
    def example(cls) -> str | None:
        return "2.5"

    def averages(self, bits: float, widths: Sequence[int]) -> tuple[float, ...]:
        """The means to make points of. bits: the one that is asked for, 0: all. UsageError for one outside the widths."""
        found = (bits,) if bits else AVERAGES
        for mean in found:
            if not min(widths) <= mean <= max(widths):
                raise UsageError(
                    f"{mean:g} bits are outside {min(widths)} to {max(widths)}", f"write {self.name.partition(':')[0]}:2.5"
                )
        return found
