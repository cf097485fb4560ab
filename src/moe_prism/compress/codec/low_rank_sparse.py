"""A matrix as two thin ones, W = L R, and the rows that they miss most, kept beside them as they are missed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Codec, Plane, Planes
from .grouped import DAMPING

STORED_BITS = 16  # bfloat16
INDEX_BYTES = 4


@dataclass(frozen=True)
class LowRankSparse(Codec):
    """MC-SMoE's form without its training. sparse: the share of the bytes that goes to rows.

    A width of b bits means b / 16 of the bytes of a bfloat16 matrix. With a Gram matrix errors count by what the inputs are, so L R is
    the best of its rank for the outputs, and the rows are those with the largest error in them. Groups do not matter.
    """

    sparse: float = 0.25
    name: ClassVar[str] = "low-rank-sparse"
    paper: ClassVar[str] = "arXiv 2310.01334"
    widths: ClassVar[tuple[float, ...]] = (2, 3, 4, 5, 6, 7, 8)
    takes_gram: ClassVar[bool] = True

    @classmethod
    def example(cls) -> Sequence[LowRankSparse]:
        return [cls(), cls(sparse=0.0)]

    def encode(self, matrix: Tensor, bits: float, group: int, gram: Tensor | None = None) -> Planes:
        self.checked(matrix, bits, group, gram)
        rank, rows = self._sizes(matrix.shape, bits)
        inputs = matrix.shape[-1]
        root = torch.eye(inputs) if gram is None else torch.linalg.cholesky(gram.float() + _damping(gram.float()))
        u, s, v = torch.linalg.svd(matrix.float() @ root, full_matrices=False)
        size = s[..., :rank].sqrt()
        left = (u[..., :rank] * size[..., None, :]).bfloat16()
        right = torch.linalg.solve(root, size[..., :, None] * v[..., :rank, :], left=False).bfloat16()
        missed = matrix.float() - left.float() @ right.float()
        worst = (missed @ root).square().sum(-1).topk(rows, -1).indices.sort(-1).values
        kept = missed.gather(-2, worst[..., None].expand(*worst.shape, inputs)).bfloat16()
        tensors = {"left": left.contiguous(), "right": right.contiguous(), "rows": worst.int(), "values": kept}
        return Planes(tuple(matrix.shape), group, [Plane(bits, tensors)])

    def decode(self, planes: Planes, bits: float) -> Tensor:
        tensors = planes.upto(bits)[0].tensors
        found = tensors["left"].float() @ tensors["right"].float()
        rows = tensors["rows"].long()[..., None].expand_as(tensors["values"])
        return found.scatter_add(-2, rows, tensors["values"].float())

    def bytes(self, shape: Sequence[int], bits: float, group: int) -> int:
        *outer, outputs, inputs = shape
        rank, rows = self._sizes(shape, bits)
        each = 2 * rank * (outputs + inputs) + rows * (2 * inputs + INDEX_BYTES)
        return int(torch.Size(outer).numel()) * each

    def _sizes(self, shape: Sequence[int], bits: float) -> tuple[int, int]:
        """(rank, rows) that the bytes of a width pay for, at least a rank of one."""
        outputs, inputs = shape[-2:]
        room = outputs * inputs * bits / 8
        rows = int(self.sparse * room / (2 * inputs + INDEX_BYTES))
        rank = int((room - rows * (2 * inputs + INDEX_BYTES)) / (2 * (outputs + inputs)))
        return max(1, min(rank, outputs, inputs)), rows


def _damping(gram: Tensor) -> Tensor:
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
    return DAMPING * mean[..., None, None] * torch.eye(gram.shape[-1])
