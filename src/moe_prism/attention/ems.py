"""A bounded cache of attention: evict what is looked at least, merge it into what is alike (EMS, arXiv 2412.08521).

Every head of every layer keeps its own `entries` tokens. A token's score is the mean attention that it has received from all queries that
could see it, plus that of the last queries, each as a share of the head's largest. What is evicted is merged into the kept key of its head
that points most alike, as means weighted by the tokens in each; where none is alike enough, it is dropped. All heads of a layer lose as
many entries, so they run as one batch. Positions are those of the whole text. Entries are only evicted after attention has used them.

transformers gives a cache no attention, so `attending` computes it. The paper's normalisation and threshold are not public: these are
ours. Shapes: H key heads, G query heads for each, n entries, q queries, d numbers of a head, w last queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UsageError

NAME = "moe_prism_ems"
"""Registered with transformers, which makes no mask for attention that it does not know: ours is causal by itself."""
_cache: ContextVar[EmsCache] = ContextVar("moe_prism_ems_cache")


@dataclass(frozen=True, kw_only=True)
class EmsSettings:
    """entries: per head and layer, at most. last: queries that count as recent. alike: least cosine of keys that are merged; above 1:
    nothing is, so all that is evicted is dropped.
    """

    entries: int = 256
    last: int = 32
    alike: float = 0.6

    def check(self) -> None:
        """UsageError for what no cache can be."""
        if self.entries < 1 or self.last < 1:
            raise UsageError(f"a cache of {self.entries} entries, {self.last} of them recent", "give at least 1 of each")


class EmsLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer: keys and values [1, H, n, d], and what attention its entries received."""

    is_sliding = False
    is_croppable = False

    def __init__(self, settings: EmsSettings) -> None:
        super().__init__()
        self.settings, self.seen = settings, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty, of the shapes that come."""
        self.dtype, self.device = key_states.dtype, key_states.device
        heads = key_states.shape[1]
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        none = torch.zeros(heads, 0, device=self.device)
        self.received, self.queries, self.tokens = none, none, none
        self.recent = torch.zeros(heads, 0, 0, device=self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add entries; all that attention may look at. UsageError for more than one sequence."""
        if len(key_states) != 1:
            raise UsageError(f"{len(key_states)} sequences share a bounded cache", "generate them one after the other")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        self.seen += new
        self.keys, self.values = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
        self.received, self.queries = (nn.functional.pad(rows, (0, new)) for rows in (self.received, self.queries))
        self.tokens = nn.functional.pad(self.tokens, (0, new), value=1.0)
        self.recent = nn.functional.pad(self.recent, (0, new))
        return self.keys, self.values

    def observe(self, attention: Tensor) -> None:
        """What the last queries looked at [H, q, n], mean over the query heads of a key head; then the cache is made to fit."""
        q, n = attention.shape[1:]
        self.received = self.received + attention.sum(1)
        can_see = torch.full((n,), float(q), device=attention.device)
        can_see[n - q :] = torch.arange(q, 0, -1, device=attention.device)  # a new token is seen by itself and what follows
        self.queries = self.queries + can_see
        self.recent = torch.cat([self.recent, attention], 1)[:, -self.settings.last :]
        if n > self.settings.entries:
            self._shrink()

    @property
    def scores(self) -> Tensor:
        """[H, n]: the larger, the longer an entry stays."""
        means, least = (self.received / self.queries.clamp(min=1), self.recent.mean(1)), torch.finfo(torch.float32).tiny
        globally, lately = (mean / mean.amax(1, keepdim=True).clamp(min=least) for mean in means)
        return globally + lately

    def _shrink(self) -> None:
        keep, size = self.settings.entries, self.scores.shape[1]
        kept = self.scores.topk(keep, dim=1).indices.sort(dim=1).values
        there = torch.zeros(self.scores.shape, dtype=torch.bool, device=self.device).scatter_(1, kept, True)
        gone = (~there).nonzero()[:, 1].view(-1, size - keep)
        self._merge(kept, gone)
        wide = kept[None, :, :, None]
        self.keys = self.keys.gather(2, wide.expand(-1, -1, -1, self.keys.shape[3]))
        self.values = self.values.gather(2, wide.expand(-1, -1, -1, self.values.shape[3]))
        self.received, self.queries, self.tokens = (rows.gather(1, kept) for rows in (self.received, self.queries, self.tokens))
        self.recent = self.recent.gather(2, kept[:, None].expand(-1, self.recent.shape[1], -1))

    def _merge(self, kept: Tensor, gone: Tensor) -> None:
        """Evicted entries [H, m] go into those kept [H, n] whose keys are most alike, or nowhere."""
        unit = nn.functional.normalize(self.keys[0].float(), dim=-1)
        size = unit.shape[-1]
        own, left = (unit.gather(1, rows[..., None].expand(-1, -1, size)) for rows in (gone, kept))
        cosine, nearest = (own @ left.transpose(1, 2)).max(-1)
        target = kept.gather(1, nearest)
        weight = self.tokens.gather(1, gone) * (cosine >= self.settings.alike)
        total = self.tokens.scatter_add(1, target, weight)
        merged = []
        for rows in (self.keys[0], self.values[0]):
            wide = target[..., None].expand(-1, -1, rows.shape[2])
            moved = rows.gather(1, gone[..., None].expand(-1, -1, rows.shape[2])).float() * weight[..., None]
            sums = (rows.float() * self.tokens[..., None]).scatter_add(1, wide, moved)
            changed = (total > self.tokens)[..., None]
            merged.append(torch.where(changed, sums / total[..., None], rows.float()).to(rows.dtype)[None])
        self.keys, self.values = merged
        self.tokens = total

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Nobody makes a mask for it."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens of the text so far, which is what positions follow from; entries may be fewer."""
        return self.seen

    def get_max_cache_shape(self) -> int:
        """No limit on the text."""
        return -1

    def get_max_length(self) -> int:
        """The same under its newer name."""
        return -1


class EmsCache(Cache):  # type: ignore[misc]
    """For one sequence of one model: `model.generate(..., past_key_values=cache)` inside `attending(model, cache)`."""

    def __init__(self, layers: int, settings: EmsSettings | None = None) -> None:
        """layers: of attention."""
        self.settings = settings or EmsSettings()
        self.settings.check()
        super().__init__(layers=[EmsLayer(self.settings) for _ in range(layers)])

    @property
    def bytes(self) -> int:
        """What keys and values take now."""
        found = [layer for layer in self.layers if layer.is_initialized]
        return sum(rows.numel() * rows.element_size() for layer in found for rows in (layer.keys, layer.values))


@contextmanager
def attending(model: Any, cache: EmsCache) -> Iterator[EmsCache]:
    """Inside the block the model's attention tells the cache what it looked at. UsageError for attention through a window."""
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None) or ()
    window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    if any(kind != "full_attention" for kind in types) or (window and not types):
        raise UsageError("some of the model's attention does not see every token", "leave --kv-entries out")
    before, token = config._attn_implementation, _cache.set(cache)
    config._attn_implementation = NAME
    try:
        yield cache
    finally:
        config._attn_implementation = before
        _cache.reset(token)


def attention(
    module: nn.Module,
    query: Tensor,  # [1, H G, q, d]
    key: Tensor,  # [1, H, n, d]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention over the entries of a layer, which hear of it. -> [1, q, H G, d]. Without dropout: nobody trains here."""
    heads, n, q = key.shape[1], key.shape[2], query.shape[2]
    grouped = query[0].view(heads, -1, q, query.shape[3])  # [H, G, q, d]
    logits = grouped @ key[0][:, None].transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    hidden = torch.ones(q, n, dtype=torch.bool, device=query.device).triu(n - q + 1)
    weights = logits.masked_fill(hidden, float("-inf")).softmax(-1, dtype=torch.float32)
    out = weights.to(value.dtype) @ value[0][:, None]
    _cache.get().layers[int(module.layer_idx)].observe(weights.mean(1))  # type: ignore[arg-type]
    return out.flatten(0, 1).transpose(0, 1)[None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
