"""The contract of compensation. Shapes: T tokens, k experts per token, N sub-experts per expert, d hidden, S sampled rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..base import LayerParts
from ..side_tensors import COMPENSATE

MIN_ROWS = 16  # dropped rows below which nothing is known of a block


@dataclass(frozen=True)
class ExpertSample:
    """Calibration rows of one expert: inputs [S, d] as they are kept, x in float32, and where a block is dropped [S, N] (bool).

    Compensation is fitted on those rows only, the weaker half of the layer's slots: the few rows where a block is strong would decide
    its mean, and there it is kept (docs/explanation/method.md has the figures).
    """

    kept: Tensor
    dropped: Tensor

    @property
    def x(self) -> Tensor:
        """[S, d], widened when it is asked for."""
        return self.kept.float()


class Compensator(ABC):
    """Makes up for dropped slots, from side tensors named `compensate.<method>.<name>`.

    What runs is `experts(x, index, weights(index, weight, keep)) + self(x, index, weight, keep)`. Nothing changes for a token whose
    slots are all kept.
    """

    method: ClassVar[str]

    def __init__(self, parts: LayerParts) -> None:
        self.parts = parts

    def tensor(self, name: str) -> Tensor:
        """A side tensor of this method, in float32 beside the layer's weights."""
        return self.parts.tensors[f"{COMPENSATE}{self.method}.{name}"].to(self.parts.layer.up.device).float()

    @classmethod
    @abstractmethod
    def fit(cls, parts: LayerParts, samples: Sequence[ExpertSample], rank: int) -> dict[str, Tensor]:
        """name -> bfloat16 tensor, from a sample per expert. rank is for methods that have one."""

    def weights(self, index: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
        """Routing weights [T, k] of the kept slots."""
        return weight

    @abstractmethod
    def estimate(self, x: Tensor, expert: int, block: int) -> Tensor | None:
        """What stands in for a dropped block for rows x [S, d] of one expert: [S, d] or [1, d] float32; None for nothing."""

    @abstractmethod
    def terms(self, x: Tensor, blocks: Blocks) -> Tensor | None:
        """Sum [T, d] (float32) over the dropped slots of routing weight x estimate; None for nothing."""

    @abstractmethod
    def parameters(self) -> tuple[int, int]:
        """Weights read for a dropped slot, and for an expert that keeps some of its slots."""

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
        """What is added [T, d] (float32). x [T, d]; index, weight [T, k], ids outside [0, E) mean none; keep [T, k, N].

        The bias of an expert that lost all its blocks is part of it: the executors drop it.
        """
        layer = self.parts.layer
        valid = (index >= 0) & (index < layer.num_experts)
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        terms = self.terms(x, Blocks.of(index, weight, ~keep & valid[:, :, None]))
        if terms is not None:
            total += terms
        if layer.down_bias is not None:
            lost = valid & ~keep.any(2)
            total += (layer.down_bias[index.clamp(0, layer.num_experts - 1)] * (weight * lost)[:, :, None]).float().sum(1)
        return total

    def losses(self, x: Tensor, expert: int) -> Tensor:
        """Norm [S, N] of what dropping each block of one expert loses after compensation, for rows x [S, d]."""
        return torch.stack([self._loss(x, expert, n) for n in range(self.parts.n_sub)], 1)

    def _loss(self, x: Tensor, expert: int, block: int) -> Tensor:
        y, estimate = outputs(self.parts, x, expert, block), self.estimate(x, expert, block)
        norm: Tensor = (y if estimate is None else y - estimate).norm(dim=-1)
        return norm


@dataclass(frozen=True)
class Blocks:
    """Dropped slots in token order: their token, sub-expert id (expert * N + block) and routing weight, [D] each; start [T]."""

    token: Tensor
    block: Tensor
    weight: Tensor
    start: Tensor

    @classmethod
    def of(cls, index: Tensor, weight: Tensor, dropped: Tensor) -> Blocks:
        """index, weight [T, k]; dropped [T, k, N] bool."""
        token, choice, block = dropped.nonzero(as_tuple=True)
        count = dropped.flatten(1).sum(1)
        return cls(token, index[token, choice] * dropped.shape[2] + block, weight[token, choice].float(), count.cumsum(0) - count)

    def combine(self, table: Tensor, weight: Tensor | None = None) -> Tensor:
        """Sum [T, d] of weight x table row of every dropped slot; table [E * N, d], weight [D] (None: the routing weight)."""
        scale = self.weight if weight is None else weight
        return torch.nn.functional.embedding_bag(self.block, table, self.start, mode="sum", per_sample_weights=scale)


def outputs(parts: LayerParts, x: Tensor, expert: int, block: int) -> Tensor:
    """[S, d] float32: one block's output for rows x [S, d], before the routing weight."""
    neurons = parts.neurons(block)
    return parts.layer.project(expert, parts.layer.activations(expert, x, neurons), neurons).float()
