"""What a model's attention was asked: the queries and keys of the block that ran last, positions in them.

transformers hands every attention function queries and keys after their norms and rotations. Inside the block below the function in use is
wrapped, whatever it is, so a packed batch of a server is seen as well. Shapes: T tokens of the forward, H heads, G heads of keys, d.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UsageError


@dataclass(frozen=True)
class Attended:
    """query [T, H, d] and key [T, G, d] of the tokens of a forward, H a multiple of G; scale: of their products."""

    query: Tensor
    key: Tensor
    scale: float

    def of(self, rows: Tensor) -> Attended:
        """Of the tokens that rows [S] name."""
        return Attended(self.query[rows], self.key[rows], self.scale)

    def shares(self, keys: Tensor, hidden: Tensor) -> Tensor:
        """[T, W]: what each token's attention gives to the tokens of keys [T, W, G, d], mean over heads; none to those hidden [T, W]."""
        tokens, _, groups, size = keys.shape
        query = self.query.float().reshape(tokens, groups, -1, size)
        logits = torch.einsum("tghd,twgd->tghw", query, keys) * self.scale
        return logits.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1).mean((1, 2))


class AttentionWatch:
    """last: what the attention before the layer that runs now was asked; None before any ran."""

    def __init__(self) -> None:
        self.last: Attended | None = None

    def of(self, tokens: int) -> Attended:
        """UsageError where it is not that of so many tokens."""
        if self.last is None or len(self.last.query) != tokens:
            raise UsageError("the attention before an MoE layer is not to be seen", "use a stage that does not ask for it")
        return self.last

    def hear(self, query: Tensor, key: Tensor, scaling: float | None) -> None:
        """query [B, H, t, d], key [B, G, n, d], of which the last t are new; T = B t."""
        size, new = query.shape[3], query.shape[2]
        asked, offered = (part.transpose(1, 2).flatten(0, 1) for part in (query, key[:, :, -new:]))
        self.last = Attended(asked, offered, size**-0.5 if scaling is None else scaling)


@contextmanager
def attention_watched(model: Any) -> Iterator[AttentionWatch]:
    """Inside the block the model's attention is heard. UsageError for one that is no function of transformers' table."""
    name, watch = model.config.get_text_config()._attn_implementation, AttentionWatch()
    if name not in ALL_ATTENTION_FUNCTIONS:
        raise UsageError(f"attention '{name}' cannot be watched", "load the model with attn_implementation='sdpa'")
    own: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]

    def heard(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any) -> Any:
        watch.hear(query, key, named.get("scaling"))
        return own(module, query, key, value, *others, **named)

    ALL_ATTENTION_FUNCTIONS.register(name, heard)
    try:
        yield watch
    finally:
        ALL_ATTENTION_FUNCTIONS.register(name, own)
