"""What methods share that spend a mean number of bits on what differs: experts, or neurons."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ...compress.codec.rtn import Rtn
from ...errors import UsageError
from ...frontier.allocation import exact
from ..base import Method

AVERAGES = 2.75, 2.5, 2.25, 2.0, 1.75


class AveragedBits(Method):
    """`NAME:2.5`, or `NAME:bits=2.5` with more parameters; without a mean one point for each of AVERAGES."""

    acts: ClassVar[str] = "weights"

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


def written_widths(text: str, group: int) -> tuple[int, ...]:
    """The widths that a parameter names, with - between, rising. UsageError for what are none of `Rtn`'s."""
    try:
        found = tuple(sorted({int(part) for part in text.split("-")}))
    except ValueError as error:
        raise UsageError(f"widths '{text}' are no numbers", "write such as 1-2-3") from error
    for bits in found:
        Rtn().check(bits, group)
    return found


def one_choice(costs: Sequence[Tensor], widths: Sequence[int], total: int) -> tuple[tuple[float, ...], ...]:
    """The width of every expert of every layer with the least sum of costs [E, W] that takes at most `total` bits; exact."""
    curves = [[(float(w), cost) for w, cost in zip(widths, row, strict=True)] for row in torch.cat(list(costs)).tolist()]
    choices = [float(widths[c]) for c in exact(curves, total).choices]
    ends = torch.tensor([0, *map(len, costs)]).cumsum(0).tolist()
    return tuple(tuple(choices[a:b]) for a, b in itertools.pairwise(ends))
