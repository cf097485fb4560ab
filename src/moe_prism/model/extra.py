"""Experts that hold no matrices: they add nothing, a copy of the input, or a constant. LongCat-Flash has some of its own.

Shapes: T tokens, d hidden, k experts per token, X extra experts, C constant ones among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import UsageError
from ..registry import choices

Kind = Literal["zero", "copy", "constant"]


@dataclass(frozen=True, eq=False)
class ExtraExperts:
    """X experts with consecutive ids. `zero` adds nothing, `copy` weight * x, `constant` weight * vector.

    vectors: [C, d], one row per constant expert in their order. UsageError for an unknown kind or another number of vectors.
    """

    kinds: tuple[Kind, ...]
    vectors: Tensor | None = None

    def __post_init__(self) -> None:
        strange = [kind for kind in self.kinds if kind not in get_args(Kind)]
        if strange:
            raise UsageError(f"unknown kind of extra expert '{strange[0]}'", choices(strange[0], get_args(Kind)))
        wanted, shape = self.kinds.count("constant"), () if self.vectors is None else tuple(self.vectors.shape)
        if (len(shape) != 2 or shape[0] != wanted) if wanted else self.vectors is not None:
            raise UsageError(f"{wanted} constant experts with vectors {list(shape)}", f"give a tensor [{wanted}, hidden]")

    def __len__(self) -> int:
        return len(self.kinds)

    @cached_property
    def parameters(self) -> tuple[int, ...]:
        """What a token that chose it reads, for every extra expert: d numbers of a constant one, none of the others."""
        width = 0 if self.vectors is None else self.vectors.shape[1]
        return tuple(width if kind == "constant" else 0 for kind in self.kinds)

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor, first: int) -> Tensor | None:
        """The sum [T, d], float32, over choices with an id in first .. first + X - 1. None if nothing is added.

        x [T, d], index [T, k], weight [T, k]. A GPU is not asked whether there are any: that would stop it.
        """
        if self._copies is None and self.vectors is None:
            return None
        at = index - first
        here = (at >= 0) & (at < len(self))
        if not index.is_cuda and not here.any():
            return None
        at, weight = at.clamp(0, len(self) - 1), weight.float() * here
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        if self._copies is not None:
            out += (weight * self._copies.to(x.device)[at]).sum(1, keepdim=True) * x
        if self.vectors is not None:
            weight = weight * self._constants.to(x.device)[at]
            vectors, row = self.vectors.to(x.device, torch.float32), self._row.to(x.device)[at]
            for c in range(index.shape[1]):  # one choice at a time: a token's sum does not depend on its batch
                out += weight[:, c, None] * vectors[row[:, c]]
        return out

    @cached_property
    def _copies(self) -> Tensor | None:
        """[X]: 1 for a copy; None without any."""
        return torch.tensor([float(kind == "copy") for kind in self.kinds]) if "copy" in self.kinds else None

    @cached_property
    def _constants(self) -> Tensor:
        return torch.tensor([float(kind == "constant") for kind in self.kinds])

    @cached_property
    def _row(self) -> Tensor:
        """[X]: which of the vectors; 0 for an expert without one."""
        return (self._constants.cumsum(0).long() - 1).clamp(min=0)


def constants(vectors: Tensor) -> ExtraExperts:
    """One constant expert per row of vectors [C, d]."""
    kind: Kind = "constant"
    return ExtraExperts((kind,) * len(vectors), vectors)
