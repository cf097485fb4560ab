"""Codecs that store a code per weight and a few numbers per group of inputs, alone or with the errors of columns fed back.

Shapes: [..., o, i] matrices, G = ceil(i / g) groups of g inputs, numbers of groups [..., o, G].
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Codec, Planes

Numbers = dict[str, Tensor]
"""What a codec knows of a group beside its codes, by role: [..., o, G]."""
DAMPING = 0.01  # of the Gram matrix's mean diagonal, added to it: some inputs were never seen


@dataclass(frozen=True)
class GroupCodec(Codec):
    """A codec says how numbers are fitted to a group, and how a value becomes a code under them."""

    takes_gram = True

    @abstractmethod
    def fit(self, values: Tensor, bits: float) -> Numbers:
        """Numbers [..., o, G] for groups of values [..., o, G, g], already rounded as they are stored."""

    @abstractmethod
    def code(self, values: Tensor, numbers: Numbers, bits: float) -> Tensor:
        """uint8 codes of values [..., o, G, g]."""

    @abstractmethod
    def value(self, codes: Tensor, numbers: Numbers, bits: float) -> Tensor:
        """float32 values of codes [..., o, G, g]."""

    @abstractmethod
    def packed(self, codes: Tensor, numbers: Numbers, bits: float, group: int) -> Planes:
        """Codes [..., o, i] and their numbers as they lie on disk."""

    @abstractmethod
    def unpacked(self, planes: Planes, bits: float) -> tuple[Tensor, Numbers]:
        """The reverse: what is read at a width."""

    def encode(self, matrix: Tensor, bits: float, group: int, gram: Tensor | None = None) -> Planes:
        self.checked(matrix, bits, group, gram)
        matrix = matrix.float()
        if gram is None:
            grouped = by_group(matrix, group)
            numbers = self.fit(grouped, bits)
        else:
            matrix, numbers = self._fed_back(matrix, bits, group, gram.float())
            grouped = by_group(matrix, group)
        codes = self.code(grouped, numbers, bits).flatten(-2)[..., : matrix.shape[-1]]
        return self.packed(codes, numbers, bits, group)

    def decode(self, planes: Planes, bits: float) -> Tensor:
        codes, numbers = self.unpacked(planes, bits)
        return self.value(by_group(codes, planes.group), numbers, bits).flatten(-2)[..., : planes.shape[-1]]

    def _fed_back(self, matrix: Tensor, bits: float, group: int, gram: Tensor) -> tuple[Tensor, Numbers]:
        """The values that are rounded instead of the matrix's own, and the numbers of their groups.

        Column after column is rounded, and what is lost with it is made up for by the columns after it, as the inputs go together:
        arXiv 2210.17323. A group's numbers are fitted when its first column is reached.
        """
        factor, found = inverse_factor(gram), []
        rest, columns = matrix.clone(), matrix.shape[-1]
        for first in range(0, columns, group):
            last = min(first + group, columns)
            numbers = self.fit(rest[..., None, first:last], bits)
            errors = torch.zeros_like(rest[..., first:last])
            for j in range(first, last):
                column = rest[..., j, None, None]
                kept = self.value(self.code(column, numbers, bits), numbers, bits)[..., 0, 0]
                error = (rest[..., j] - kept) / factor[..., j, None, j]
                rest[..., j + 1 : last] -= error[..., None] * factor[..., j, None, j + 1 : last]
                errors[..., j - first] = error
            rest[..., last:] -= errors @ factor[..., first:last, last:]
            found.append(numbers)
        return rest, {role: torch.cat([numbers[role] for numbers in found], -1) for role in found[0]}


def by_group(values: Tensor, group: int) -> Tensor:
    """[..., o, i] -> [..., o, G, g], filled up with zeros."""
    return torch.unflatten(torch.nn.functional.pad(values, (0, -values.shape[-1] % group)), -1, (-1, group))


def inverse_factor(gram: Tensor) -> Tensor:
    """[..., i, i]: the upper triangle U with U^T U = the inverse of the damped Gram matrix."""
    gram = gram.clone()
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += DAMPING * diagonal.mean(-1, keepdim=True).clamp_min(1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def stored(numbers: Tensor) -> Tensor:
    """Numbers as their stored type has them: bfloat16, in float32."""
    return numbers.bfloat16().float()


def halves(numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Numbers that `stored` rounded, as they lie on disk."""
    return {role: number.bfloat16() for role, number in numbers.items()}
