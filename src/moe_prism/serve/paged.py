"""Attention of a packed batch over the paged cache, on a CPU.

transformers' own path there builds one mask over all requests of the batch, so every request pays for the context of every other
one, and lists the cache position of every context token in Python, every step. Here requests that decode are computed together,
padded to the longest of their group, and a prompt is computed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "moe_prism_flash_paged"
"""Registered with transformers. "flash" in a name is how it knows that no mask is to be built."""


@dataclass(frozen=True)
class Segment:
    """One request's part of a packed batch: tokens [start, start + queries) of it, behind `past` tokens in the cache blocks `blocks`."""

    start: int
    queries: int
    past: int
    blocks: Sequence[int]

    @property
    def total(self) -> int:
        return self.past + self.queries


@dataclass
class Layout:
    """How the packed batch of one step lies in the cache; shared by all layers."""

    decode: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # rows [D], cache index [D, C], mask [D, 1, 1, C]
    prompts: list[tuple[slice, Tensor | None, Tensor | None]] = field(default_factory=list)  # rows, cache index [C], mask [q, C]


def plan(segments: Sequence[Segment], page: int, stride: int) -> Layout:
    """Lay out a step. page: tokens per cache block; stride: distance of two blocks in rows of the layer's cache view."""
    layout = Layout()
    groups: dict[int, list[Segment]] = {}
    for segment in segments:
        if segment.queries == 1:
            groups.setdefault(segment.total.bit_length(), []).append(segment)  # within a group, padding at most doubles the work
        else:
            layout.prompts.append(_prompt(segment, page, stride))
    for group in groups.values():
        length = max(s.total for s in group)
        pages = -(-length // page)
        table = torch.tensor([[*s.blocks[:pages], *([s.blocks[0]] * (pages - len(s.blocks)))] for s in group])
        index = (table[:, :, None] * stride + torch.arange(page)).flatten(1)[:, :length]
        lengths = torch.tensor([s.total for s in group])
        mask = None if bool((lengths == length).all()) else torch.arange(length)[None, :] < lengths[:, None]
        rows = torch.tensor([s.start for s in group])
        layout.decode.append((rows, index, torch.tensor(()) if mask is None else mask[:, None, None, :]))
    return layout


def _prompt(segment: Segment, page: int, stride: int) -> tuple[slice, Tensor | None, Tensor | None]:
    rows = slice(segment.start, segment.start + segment.queries)
    if segment.past == 0:
        return rows, None, None
    pages = -(-segment.total // page)
    index = (torch.tensor(segment.blocks[:pages])[:, None] * stride + torch.arange(page)).flatten()[: segment.total]
    mask = torch.ones(segment.queries, segment.total, dtype=torch.bool).tril(segment.past)
    return rows, index, mask


def attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, d]
    key: Tensor,  # [1, key heads, T, d]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Writes the new keys and values, then attends request by request. -> [1, T, heads, d]."""
    cache = kwargs["cache"]
    layout: Layout = cache.moe_prism_layout
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=kwargs)
    keys, values = cache.layer_to_allocator[layer]._kv_token_views[layer]
    shared = query.shape[1] != key.shape[1]  # grouped-query attention

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        return nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scaling, is_causal=causal, enable_gqa=shared
        )

    q = query[0].transpose(0, 1)  # [T, heads, d]
    out = torch.empty_like(q)
    for rows, index, mask in layout.decode:
        k, v = _read(keys, index), _read(values, index)
        out[rows] = attend(q[rows].unsqueeze(2), k, v, mask if mask.numel() else None).squeeze(2)
    for span, positions, chunk_mask in layout.prompts:
        if positions is None:
            k, v = key[:, :, span], value[:, :, span]
        else:
            k, v = _read(keys, positions[None]), _read(values, positions[None])
        out[span] = attend(query[:, :, span], k, v, chunk_mask, causal=positions is None)[0].transpose(0, 1)
    return out[None], None


def _read(cache: Tensor, index: Tensor) -> Tensor:
    """cache [rows, key heads, d] at index [D, C] -> [D, key heads, C, d]. `index_select` copies rows twice as fast as indexing."""
    return cache.index_select(0, index.flatten()).view(*index.shape, *cache.shape[1:]).transpose(1, 2)


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
