"""A quantized matrix in one form, whatever format stored it: codes on a grid of values, scales and zeros per group.

Shapes: [..., o, i] o outputs, i inputs; a group is go x gi codes with one scale, so scales are [..., ceil(o / go), ceil(i / gi)].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import UsageError
from .grids import Grid, RoundScale


@dataclass(frozen=True)
class CodedMatrix:
    """value = (grid(code) - zero) * scale. zeros: None where there are none, else as `scales`, which is float32.

    round_scale: what the format can store as a scale. zero_range: the zeros a group may have; None where they stay as they are.
    """

    codes: Tensor
    grid: Grid
    scales: Tensor
    group: tuple[int, int]
    round_scale: RoundScale
    zeros: Tensor | None = None
    zero_range: tuple[int, int] | None = None

    def values(self, transposed: bool = False) -> Tensor:
        """Dequantized, float32 [..., o, i], or [..., i, o]. Memory: the result and three copies of one matrix."""
        if self.codes.ndim > 2:
            *outer, rows, columns = self.codes.shape
            found = torch.empty((*outer, columns, rows) if transposed else self.codes.shape, dtype=torch.float32)
            for at, each in enumerate(self.each()):
                whole = each.values()
                found[at] = whole.mT if transposed else whole
            return found
        values = self.grid.decode(self.codes)
        if self.zeros is not None:
            values = values - spread(self.zeros, self.group, self.codes.shape)
        values = values * spread(self.scales, self.group, self.codes.shape)
        return values.mT.contiguous() if transposed else values

    def each(self) -> Iterator[CodedMatrix]:
        """The matrices [.., o, i] along the first dimension."""
        for at in range(len(self.codes)):
            zeros = None if self.zeros is None else self.zeros[at]
            yield replace(self, codes=self.codes[at], scales=self.scales[at], zeros=zeros)


def spread(per_group: Tensor, group: tuple[int, int], shape: torch.Size) -> Tensor:
    """[.., groups, groups] -> [.., o, i]: every code's own; a group over all rows or columns stays one wide."""
    rows, columns = shape[-2:]
    if group[0] > 1 and per_group.shape[-2] > 1:
        per_group = per_group.repeat_interleave(group[0], -2)[..., :rows, :]
    if group[1] > 1 and per_group.shape[-1] > 1:
        per_group = per_group.repeat_interleave(group[1], -1)[..., :columns]
    return per_group


def checked(scales: Tensor, codes: Tensor, group: tuple[int, int]) -> Tensor:
    """The scales, if there is one per group of the codes."""
    wanted = (*codes.shape[:-2], -(-codes.shape[-2] // group[0]), -(-codes.shape[-1] // group[1]))
    if tuple(scales.shape) != wanted:
        raise UsageError(
            f"a weight of shape {tuple(codes.shape)} in groups of {group} has scales of shape {tuple(scales.shape)}, not {wanted}",
            "check that config.json belongs to these weights",
        )
    return scales
