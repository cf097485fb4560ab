"""One sequence with its own cache of attention, run forward at any step, and taken back.

Shapes: t tokens of the sequence, V vocabulary.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ...cache_names import cache_argument
from ...elastic.bind import Step
from ...elastic.runtime import Elastic
from ...errors import UsageError
from ...frontier.cost import measured_cost


@dataclass
class Spent:
    """What decoding has run. forwards: passes of the model; rows: tokens that they computed; expert_bytes: what they read of experts, each
    block once per pass however many of its tokens want it. The bytes are counted where `counting` is set, which takes time.
    """

    counting: bool = False
    forwards: int = 0
    rows: int = 0
    expert_bytes: float = 0.0


@dataclass
class Sequence:
    """Tokens, and the cache of those that were computed.

    ids: every token, [t] Python numbers. spent: shared by all sequences of a request.
    """

    model: Any
    elastic: Elastic
    ids: list[int]
    spent: Spent
    cache: Any = field(default_factory=DynamicCache)

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are there."""
        return int(self.cache.get_seq_length())

    @torch.no_grad()
    def forward(self, step: Step, rows: int = 1) -> Tensor:
        """Compute the tokens that are not in the cache: logits [rows, V] (float32) behind the last ones.

        One sequence without padding: positions follow from the cache.
        """
        new = torch.tensor([self.ids[self.cached :]], device=self.model.device)
        spent = self.spent
        with self.elastic.at(step):
            if spent.counting:
                with self.elastic.count():
                    logits = self._run(new, rows)
                spent.expert_bytes += measured_cost(self.elastic, step).distinct_expert_bytes
            else:
                logits = self._run(new, rows)
        spent.forwards += 1
        spent.rows += new.shape[1]
        return logits

    @torch.no_grad()
    def read(self, step: Step, tokens: int) -> None:
        """Compute the next tokens that are not in the cache, so many at most, and ask for nothing behind them."""
        new = torch.tensor([self.ids[self.cached : self.cached + tokens]], device=self.model.device)
        with self.elastic.at(step):
            self._run(new, 1)
        self.spent.forwards += 1
        self.spent.rows += new.shape[1]

    def _run(self, new: Tensor, rows: int) -> Tensor:
        out = self.model(input_ids=new, use_cache=True, logits_to_keep=rows, **cache_argument(self.model, self.cache))
        return out.logits[0, -rows:].float()  # type: ignore[no-any-return]

    def take_back(self, length: int) -> None:
        """Forget the keys and values behind the first `length` tokens. UsageError for a cache that has thrown older ones away."""
        for layer in self.cache.layers:
            if type(layer) is not DynamicLayer:
                raise UsageError(
                    f"the model's cache ({type(layer).__name__}) cannot take tokens back", "leave decoding out of the point"
                )
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]

    def fork(self) -> Sequence:
        """A sequence that goes on alone from here. Keys and values are shared until one of the two adds to them."""
        self.take_back(self.cached)  # refuses what it cannot copy
        cache = copy(self.cache)
        cache.layers = [copy(layer) for layer in self.cache.layers]
        return Sequence(self.model, self.elastic, list(self.ids), self.spent, cache)
