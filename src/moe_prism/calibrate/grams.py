"""What every expert, chosen or not, would put out for a sample of a layer's tokens: enough to replay any choice of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..model import MoELayer
from .base import Collector, Kept, RoutedBatch
from .tokens import SKIPPED_POSITIONS, token_keys


class Grams(Collector):
    """A uniform sample of S <= capacity tokens, by the same hash as `tokens`, so that passes continue and merge exactly.

    gram [S, E, E]: inner products of the outputs o of all experts, over ‖h + y‖² (h the residual stream, y the routed output): the squared
    error of any other choice or weight of experts, relative to what the next layer reads, is a quadratic form of it. scores [S, E],
    index and weight [S, k]: what the router gave and chose. key [S], ascending; kept [1]. All float32 and int64. Without the residual
    stream the errors are relative to ‖y‖².
    """

    needs: ClassVar[frozenset[str]] = frozenset({"scores", "residual"})
    keeps: ClassVar[Mapping[str, Kept]] = {
        "gram": (("S", "E", "E"), torch.float32),
        "scores": (("S", "E"), torch.float32),
        "index": (("S", "k"), torch.int64),
        "weight": (("S", "k"), torch.float32),
        "key": (("S",), torch.int64),
    }

    def __init__(self, layer: MoELayer, *, capacity: int, seed: int) -> None:
        super().__init__(layer, capacity=capacity, seed=seed)
        e = layer.num_experts
        self.rows: dict[str, Tensor] = {
            "gram": torch.zeros(0, e, e),
            "scores": torch.zeros(0, e),
            "index": torch.zeros(0, 0, dtype=torch.int64),
            "weight": torch.zeros(0, 0),
            "key": torch.zeros(0, dtype=torch.int64),
        }

    def update(self, batch: RoutedBatch) -> None:
        if batch.scores is None:
            return
        number = torch.arange(batch.first_token, batch.first_token + len(batch.x))
        keys = token_keys(number.numpy(), self.seed, self.layer.index)
        wanted = (number % batch.window) >= SKIPPED_POSITIONS
        if len(self.rows["key"]) == self.capacity:
            wanted &= keys < self.rows["key"][-1]
        token = wanted.nonzero()[:, 0]
        token = token[keys[token].argsort()[: self.capacity]]
        if len(token):
            self.merge({**self._seen(batch, token.to(batch.x.device)), "key": keys[token]})

    def _seen(self, batch: RoutedBatch, token: Tensor) -> dict[str, Tensor]:
        x, index, weight = batch.x[token], batch.index[token], batch.weight[token].float()
        out = torch.stack([self._output(e, x) for e in range(self.layer.num_experts)], 1)
        chosen = out.gather(1, index.clamp(0, out.shape[1] - 1).long()[:, :, None].expand(-1, -1, out.shape[2]))
        after = (chosen * weight[:, :, None]).sum(1)
        if batch.residual is not None:
            after = after + batch.residual[token].float()
        gram = out @ out.transpose(1, 2) / after.square().sum(1).clamp(min=1e-30)[:, None, None]
        assert batch.scores is not None
        return {
            "gram": gram.cpu(),
            "scores": batch.scores[token].float().cpu(),
            "index": index.long().cpu(),
            "weight": weight.cpu(),
        }

    def _output(self, expert: int, x: Tensor) -> Tensor:
        out = self.layer.project(expert, self.layer.activations(expert, x))
        return (out if self.layer.down_bias is None else out + self.layer.down_bias[expert]).float()

    def merge(self, state: dict[str, Tensor]) -> None:
        """Take in the sample of other tokens."""
        if not len(state["key"]):
            return
        mine = {k: v.reshape(0, *state[k].shape[1:]) if not len(v) else v for k, v in self.rows.items()}
        order = torch.cat([mine["key"], state["key"]]).argsort()[: self.capacity]
        self.rows = {name: torch.cat([mine[name], state[name]])[order] for name in mine}

    def state(self) -> dict[str, Tensor]:
        return dict(self.rows)

    def load(self, state: dict[str, Tensor]) -> None:
        self.rows = {name: state[name].clone() for name in self.rows}

    @staticmethod
    def bytes_per_layer(layer: MoELayer, capacity: int) -> int:
        e = layer.num_experts
        return capacity * (4 * e * e + 4 * e + 12 * e + 8)  # at most E chosen experts per token
