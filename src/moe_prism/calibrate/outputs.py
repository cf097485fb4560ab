"""How large the outputs of each expert are for the tokens it was chosen for: what the output-based pruning criteria read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..model import MoELayer
from .base import Collector, Kept, RoutedBatch

SUMS = ("norm", "norm_sq", "gated", "gated_sq", "easy")


class Outputs(Collector):
    """Per expert, over its routed tokens, with o its output before the routing weight g (float64 sums [E] unless said otherwise).

    count (int64); norm Σ‖o‖, norm_sq Σ‖o‖²; gated Σ g‖o‖, gated_sq Σ g²‖o‖²; easy Σ max(0, 1 - cos(h, h + y)) g‖o‖ with h the residual
    stream and y the layer's routed output (EASY-EP); max: the largest |o| of any token and channel. Per layer: hidden_max, the largest
    |h + y| [1]; tokens [1] of them all and residual_tokens [1] of those whose residual stream was seen.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"residual"})
    has_domains = True
    keeps: ClassVar[Mapping[str, Kept]] = {
        **dict.fromkeys(SUMS, (("E",), torch.float64)),
        "count": (("E",), torch.int64),
        "max": (("E",), torch.float32),
        "hidden_max": ((1,), torch.float32),
        "tokens": ((1,), torch.int64),
        "residual_tokens": ((1,), torch.int64),
    }

    def __init__(self, layer: MoELayer, *, capacity: int, seed: int) -> None:
        super().__init__(layer, capacity=capacity, seed=seed)
        e = layer.num_experts
        self.values = {name: torch.zeros(e, dtype=torch.float64) for name in SUMS}
        self.values |= {"count": torch.zeros(e, dtype=torch.int64), "max": torch.zeros(e), "hidden_max": torch.zeros(1)}
        self.values |= {name: torch.zeros(1, dtype=torch.int64) for name in ("tokens", "residual_tokens")}

    def update(self, batch: RoutedBatch) -> None:
        norms, peaks, total = expert_outputs(self.layer, batch)
        valid = (batch.index >= 0) & (batch.index < self.layer.num_experts)
        gate = batch.weight.double().abs()
        self._sum("count", batch.index, valid, torch.ones_like(batch.index))
        self._sum("norm", batch.index, valid, norms)
        self._sum("norm_sq", batch.index, valid, norms.square())
        self._sum("gated", batch.index, valid, gate * norms)
        self._sum("gated_sq", batch.index, valid, (gate * norms).square())
        self.values["max"] = torch.maximum(self.values["max"], peaks)
        self.values["tokens"] += len(batch.x)
        if batch.residual is not None:
            h = batch.residual.float()
            turned = (1 - nn.functional.cosine_similarity(h, h + total, dim=1)).clamp(min=0).double()
            self._sum("easy", batch.index, valid, turned[:, None] * gate * norms)
            self.values["hidden_max"] = torch.maximum(self.values["hidden_max"], (h + total).abs().amax().cpu()[None])
            self.values["residual_tokens"] += len(batch.x)

    def _sum(self, name: str, index: Tensor, valid: Tensor, values: Tensor) -> None:
        target = self.values[name]
        target.index_add_(0, index[valid].long().cpu(), values[valid].to("cpu", target.dtype))

    def state(self) -> dict[str, Tensor]:
        return dict(self.values)

    def load(self, state: dict[str, Tensor]) -> None:
        self.values = {name: state[name].clone() for name in self.values}

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add what another pass over other tokens found."""
        for name, mine in self.values.items():
            other = state[name]
            self.values[name] = torch.maximum(mine, other) if name in ("max", "hidden_max") else mine + other

    @staticmethod
    def bytes_per_layer(layer: MoELayer, capacity: int) -> int:
        return layer.num_experts * (8 * (len(SUMS) + 1) + 4) + 20


def expert_outputs(layer: MoELayer, batch: RoutedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """(norms ‖o‖ [T, k] float64, largest |o| per expert [E], routed output [T, d] float32) of a batch, one expert at a time."""
    norms = torch.zeros(batch.index.shape, dtype=torch.float64, device=batch.x.device)
    peaks = torch.zeros(layer.num_experts)
    total = torch.zeros(batch.x.shape, dtype=torch.float32, device=batch.x.device)
    for e, token, choice, out in each_output(layer, batch):
        norms[token, choice] = out.double().norm(dim=1)
        peaks[e] = out.abs().amax().cpu()
        total.index_add_(0, token, out * batch.weight[token, choice, None].float())
    return norms, peaks, total


def each_output(layer: MoELayer, batch: RoutedBatch) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(expert, its tokens [S], their choices [S], its outputs [S, d] float32 before the routing weight) of every expert that was chosen."""
    for e in range(layer.num_experts):
        token, choice = torch.where(batch.index == e)
        if not len(token):
            continue
        out = layer.project(e, layer.activations(e, batch.x[token]))
        yield e, token, choice, (out if layer.down_bias is None else out + layer.down_bias[e]).float()
