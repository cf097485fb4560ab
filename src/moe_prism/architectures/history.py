"""What routers that look at earlier tokens keep of them: in the cache of attention, behind the layers' own entries.

Shapes: B texts, L tokens of this call, S tokens so far, n numbers of a token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from ..cache_names import given_cache
from ..errors import UsageError

ADVICE = "run it with transformers' ordinary cache, or without one"


class Earlier(NamedTuple):
    """values [B, S, n] of all tokens so far; seen [B or 1, L, S]: which of them a token may look at, itself included."""

    values: Tensor
    seen: Tensor


class TokenHistory:
    """Of one layer. It notes, before a layer's attention runs, its cache and its mask, and after it the weights that it gives.

    A block that is run without its attention has no history: its tokens are one text, and no cache keeps them.
    """

    def __init__(self, attention: nn.Module, index: int, layers: int) -> None:
        self.place = layers + index
        self.cache: Any = None
        self.mask: Tensor | None = None
        self.attended: Tensor | None = None
        attention.register_forward_pre_hook(self._before, with_kwargs=True)
        attention.register_forward_hook(self._after)

    def _before(self, _module: nn.Module, _given: Any, named: dict[str, Any]) -> None:
        self.cache, self.mask = given_cache(named), named.get("attention_mask")

    def _after(self, _module: nn.Module, _given: Any, output: Any) -> None:
        self.attended = output[1]

    def weights(self) -> Tensor | None:
        """What attention gave for these tokens [B, H, L, S]; None where it did not run."""
        found, self.attended = self.attended, None
        return found

    def add(self, values: Tensor) -> Earlier:
        """Note values [B, L, n] of these tokens. UsageError where the cache has not kept all tokens before."""
        length, cache, mask = values.shape[1], self.cache, self.mask
        self.cache = self.mask = None
        if cache is not None:
            if not hasattr(cache, "layers"):
                raise UsageError("a router of this model looks at earlier tokens, which this cache does not hold", ADVICE)
            while len(cache.layers) <= self.place:
                cache.layers.append(DynamicLayer())
            values = cache.update(values[:, None], values[:, None, :, :0], self.place)[0][:, 0]
        size = values.shape[1]
        if mask is None:
            return Earlier(values, torch.ones(length, size, dtype=torch.bool, device=values.device).tril(size - length)[None])
        seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0
        if seen.shape[-2:] != (length, size):
            raise UsageError("a router of this model looks at earlier tokens, and the cache has dropped some", ADVICE)
        own = torch.eye(length, size, dtype=torch.bool, device=values.device).roll(size - length, 1)
        return Earlier(values, seen | own)  # a padding token sees itself at least, so that no row is empty
