"""A uniform sample of the inputs each expert was chosen for; activations are replayed from it without another model pass.

Bottom-k sampling: every token gets a key that is a hash of (seed, layer, its number in the pass), and an expert keeps the tokens
with the smallest keys. So the sample does not depend on batch size or order, two samples merge exactly, and an interrupted pass
continues bit-identically. Storing inputs instead of activations serves partition, gate neurons and predictors alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..model import MoELayer
from .base import Collector, Kept, RoutedBatch

# The first token of a window has massive activations that say nothing about the others (spec of Super Experts; measured).
SKIPPED_POSITIONS = 1


class TokenReservoir(Collector):
    """x [E, capacity, d] (float16), weight [E, capacity], key [E, capacity] (int64, ascending), kept [E]."""

    keeps: ClassVar[Mapping[str, Kept]] = {
        "x": (("E", "C", "d"), torch.float16),
        "weight": (("E", "C"), torch.float32),
        "key": (("E", "C"), torch.int64),
        "kept": (("E",), torch.int64),
    }

    def __init__(self, layer: MoELayer, *, capacity: int, seed: int) -> None:
        super().__init__(layer, capacity=capacity, seed=seed)
        e = layer.num_experts
        self.x = torch.zeros(e, capacity, layer.hidden, dtype=torch.float16)
        self.weight = torch.zeros(e, capacity, dtype=torch.float32)
        self.key = torch.full((e, capacity), torch.iinfo(torch.int64).max)
        self.kept = torch.zeros(e, dtype=torch.int64)

    def update(self, batch: RoutedBatch) -> None:
        tokens = batch.x.shape[0]
        number = torch.arange(batch.first_token, batch.first_token + tokens)
        keys = token_keys(number.numpy(), self.seed, self.layer.index)
        usable = (number % batch.window) >= SKIPPED_POSITIONS
        index, weight = batch.index.cpu(), batch.weight.float().cpu()
        for e in range(self.layer.num_experts):
            token, choice = torch.where((index == e) & usable[:, None])
            if len(token):
                self._merge(e, keys[token], batch.x, token, weight[token, choice])

    def _merge(self, e: int, keys: Tensor, x: Tensor, token: Tensor, weight: Tensor) -> None:
        kept = int(self.kept[e])
        if kept == self.capacity:  # most tokens lose against a full reservoir: drop them before copying anything
            winners = keys < self.key[e, -1]
            keys, token, weight = keys[winners], token[winners], weight[winners]
            if not len(keys):
                return
        self._take(e, keys, x[token.to(x.device)].clamp(-65504, 65504).to("cpu", torch.float16), weight)

    def _take(self, e: int, keys: Tensor, rows: Tensor, weight: Tensor) -> None:
        """Inputs [S, d] (float16) of an expert with their keys and weights [S]."""
        kept = int(self.kept[e])
        all_keys = torch.cat([self.key[e, :kept], keys])
        order = all_keys.argsort()[: self.capacity]
        n = len(order)
        self.x[e, :n] = torch.cat([self.x[e, :kept], rows])[order]
        self.weight[e, :n] = torch.cat([self.weight[e, :kept], weight])[order]
        self.key[e, :n] = all_keys[order]
        self.kept[e] = n

    def merge(self, state: dict[str, Tensor]) -> None:
        """Take in the sample of other tokens: the smallest keys of both."""
        for e, count in enumerate(state["kept"].tolist()):
            if count:
                self._take(e, state["key"][e, :count], state["x"][e, :count], state["weight"][e, :count])

    def state(self) -> dict[str, Tensor]:
        return {"x": self.x, "weight": self.weight, "key": self.key, "kept": self.kept}

    def load(self, state: dict[str, Tensor]) -> None:
        self.x, self.weight, self.key, self.kept = (state[k].clone() for k in ("x", "weight", "key", "kept"))

    @staticmethod
    def bytes_per_layer(layer: MoELayer, capacity: int) -> int:
        return layer.num_experts * (capacity * (2 * layer.hidden + 12) + 8)


def token_keys(number: np.ndarray, seed: int, layer: int) -> Tensor:
    """SplitMix64 of the token's number, with a stream per (seed, layer); 63 bits, so int64 order is the hash's order."""
    with np.errstate(over="ignore"):
        z = number.astype(np.uint64) + np.uint64((seed * 1_000_003 + layer + 1) % 2**64) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z ^= z >> np.uint64(31)
    return torch.from_numpy((z >> np.uint64(1)).astype(np.int64))
