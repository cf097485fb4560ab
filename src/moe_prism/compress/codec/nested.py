"""One file, several widths: a base of few bits, then planes of signs. Whoever reads fewer planes reads a coarser matrix.

A base of b bits has 2^b cells of one size over the range of a group, and a weight is the middle of its cell. Each further plane says in
which half of the cell it lies. So every width is uniform rounding with cells half as wide as before, and a weight's error falls by four.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...checkpoint.formats.bits import pack_dense, unpack_dense
from ...errors import UsageError
from .base import Plane, Planes
from .grouped import GroupCodec, Numbers, halves, stored

RATIOS = tuple(0.7 + 0.025 * i for i in range(13))
"""Shares of a group's range that are tried for the cells; what lies outside gets the outermost cell."""


@dataclass(frozen=True)
class Nested(GroupCodec):
    """Bit-nested weights. base: bits of the first plane. symmetric: cells lie around 0; else around a middle that each group stores.

    own_sizes: the published form, in which every plane of signs stores what a sign is worth in each group, the mean error that it meets
    (2 bytes per group and plane). Without, a sign is worth half of what the one before it was, which takes no bytes.
    most: bits of the file that all widths are read from, which decides the cells; 0: those that are asked for.
    """

    base: int = 2
    symmetric: bool = True
    own_sizes: bool = False
    most: int = 0
    name: ClassVar[str] = "nested"
    paper: ClassVar[str] = "arXiv 2504.15299"
    widths: ClassVar[tuple[float, ...]] = (2, 3, 4, 5, 6, 7, 8)

    @classmethod
    def example(cls) -> Sequence[Nested]:
        return [cls(), cls(symmetric=False), cls(own_sizes=True), cls(base=1), cls(base=4)]

    def encode(self, matrix: Tensor, bits: float, group: int, gram: Tensor | None = None) -> Planes:
        found = super().encode(matrix, max(bits, self.most), group, gram)
        return found if bits >= self.most else Planes(found.shape, group, found.upto(bits))

    def fit(self, values: Tensor, bits: float) -> Numbers:
        """The share of the range with the least error, each width's counted as much as the one before it though it is a quarter."""
        low, high = values.amin(-1), values.amax(-1)
        middle = torch.zeros_like(low) if self.symmetric else stored((low + high) / 2)
        reach = torch.maximum(high - middle, middle - low)
        if self.symmetric and not self.own_sizes and values.device.type == "cpu":
            return {"cell": self._cells(values, reach, bits), "middle": middle}
        return self.fit_plainly(values, middle, reach, bits)

    def fit_plainly(self, values: Tensor, middle: Tensor, reach: Tensor, bits: float) -> Numbers:
        """`fit` in the form to read; middle, reach [..., o, G]: of each group."""
        best: tuple[Tensor, Numbers] | None = None
        for ratio in RATIOS:
            cell = stored((2 * reach * ratio / 2**self.base).clamp_min(1e-30))
            numbers = {"cell": cell, "middle": middle}
            numbers |= self._sizes(values, numbers, bits)
            codes = self.code(values, numbers, bits)
            error = sum(
                4.0**plane * (self._value(codes >> (int(bits) - self.base - plane), numbers, plane) - values).square().sum(-1)
                for plane in range(int(bits) - self.base + 1)
            )
            assert isinstance(error, Tensor)
            if best is None:
                best = error, numbers
            else:
                better = error < best[0]
                merged = {role: torch.where(better, number, best[1][role]) for role, number in numbers.items()}
                best = torch.where(better, error, best[0]), merged
        assert best is not None
        return best[1]

    def _cells(self, values: Tensor, reach: Tensor, bits: float) -> Tensor:
        """What `fit` chooses for the plain form, by compiled code."""
        from ...kernels.nested_cells import best_cells  # compiles on first use

        cells = torch.stack([stored((2 * reach * ratio / 2**self.base).clamp_min(1e-30)) for ratio in RATIOS]).flatten(1)
        best = torch.zeros(cells.shape[1], dtype=torch.long)
        groups = values.detach().flatten(0, -2).contiguous()
        best_cells(groups.numpy(), cells.detach().contiguous().numpy(), self.base, int(bits) - self.base, best.numpy())
        return cells.gather(0, best[None])[0].view(reach.shape)

    def code(self, values: Tensor, numbers: Numbers, bits: float) -> Tensor:
        """The base in the highest bits, then a sign per plane."""
        centred = values - numbers["middle"][..., None]
        half = 2.0 ** (self.base - 1)
        if not self.own_sizes:  # each sign halves a cell: all of them together are finer cells
            finer = 2.0 ** (int(bits) - self.base)
            return (centred / numbers["cell"][..., None]).add_(half).mul_(finer).floor_().clamp_(0, 2 * half * finer - 1).byte()
        found = (centred / numbers["cell"][..., None] + half).floor().clamp(0, 2 * half - 1)
        reached = (found + 0.5 - half) * numbers["cell"][..., None]
        for plane in range(1, int(bits) - self.base + 1):
            above = centred >= reached
            reached = reached + torch.where(above, 1.0, -1.0) * self._size(numbers, plane)
            found = 2 * found + above
        return found.to(torch.uint8)

    def value(self, codes: Tensor, numbers: Numbers, bits: float) -> Tensor:
        return self._value(codes, numbers, int(bits) - self.base)

    def packed(self, codes: Tensor, numbers: Numbers, bits: float, group: int) -> Planes:
        last = int(bits) - self.base
        own = {"cell": numbers["cell"]} | ({} if self.symmetric else {"middle": numbers["middle"]})
        planes = [Plane(self.base, {"codes": pack_dense(codes >> last, self.base), **halves(own)})]
        for plane in range(1, last + 1):
            size = halves({"size": numbers[f"size {plane}"]}) if self.own_sizes else {}
            planes.append(Plane(self.base + plane, {"signs": pack_dense((codes >> (last - plane)) & 1, 1), **size}))
        return Planes(tuple(codes.shape), group, planes)

    def unpacked(self, planes: Planes, bits: float) -> tuple[Tensor, Numbers]:
        base, *signs = planes.upto(bits)
        cell, inputs = base.tensors["cell"].float(), planes.shape[-1]
        middle = torch.zeros_like(cell) if self.symmetric else base.tensors["middle"].float()
        numbers = {"cell": cell, "middle": middle}
        codes = unpack_dense(base.tensors["codes"], self.base, inputs)
        for plane, read in enumerate(signs, 1):
            codes = 2 * codes + unpack_dense(read.tensors["signs"], 1, inputs)
            if self.own_sizes:
                numbers[f"size {plane}"] = read.tensors["size"].float()
        return codes, numbers

    def bytes(self, shape: Sequence[int], bits: float, group: int) -> int:
        *outer, inputs = shape
        planes, groups = int(bits) - self.base, -(-inputs // group)
        numbers = 2 * groups * (1 + (not self.symmetric) + self.own_sizes * planes)
        return int(torch.Size(outer).numel()) * (-(-inputs * self.base // 8) + -(-inputs // 8) * planes + numbers)

    @property
    def legal(self) -> tuple[float, ...]:
        return tuple(bits for bits in self.widths if bits >= self.base and (not self.most or bits <= self.most))

    def __post_init__(self) -> None:
        if self.base not in (1, *self.widths):
            raise UsageError(f"a base of {self.base} bits", "give 1 to 8")
        if self.most and self.most not in self.legal:
            raise UsageError(f"a file of {self.most} bits on {self.base}", f"give {self.base} to 8, or 0")

    def _value(self, codes: Tensor, numbers: Numbers, planes: int) -> Tensor:
        """Of codes with so many signs."""
        found = ((codes >> planes).float() + 0.5 - 2.0 ** (self.base - 1)) * numbers["cell"][..., None]
        for plane in range(1, planes + 1):
            found = found + (((codes >> (planes - plane)) & 1).float() * 2 - 1) * self._size(numbers, plane)
        return found + numbers["middle"][..., None]

    def _size(self, numbers: Numbers, plane: int) -> Tensor:
        """What a sign of a plane is worth [..., o, G, 1]: of the first a quarter of a cell."""
        return (numbers[f"size {plane}"] if self.own_sizes else numbers["cell"] * 0.5 ** (plane + 1))[..., None]

    def _sizes(self, values: Tensor, numbers: Numbers, bits: float) -> Numbers:
        """The mean error that each plane meets, where it is stored."""
        found: Numbers = {}
        for plane in range(1, int(bits) - self.base + 1 if self.own_sizes else 1):
            known = {**numbers, **found}
            codes = self.code(values, known, self.base + plane - 1)
            found[f"size {plane}"] = stored((values - self._value(codes, known, plane - 1)).abs().mean(-1))
        return found
