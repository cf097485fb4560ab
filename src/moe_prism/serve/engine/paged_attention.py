"""Attention of a packed batch over the paged cache, on a CPU.

transformers' own path there builds one mask over all requests of the batch, so every request pays for the context of every other
one, and lists the cache position of every context token in Python, every step. Here requests that decode go through a kernel that reads
the cache in place, and every prompt is computed alone. float32 only.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...kernels.paged_decode import DecodeRows, PagedCache, decode_attention
from .widths import to_width

NAME = "moe_prism_flash_paged"
"""Registered with transformers. "flash" in a name is how it knows that no mask is to be built."""
CACHE = "moe_prism_cache"
"""The argument of a model through which the cache reaches `attention`."""

WORTH_A_THREAD = 4096  # context tokens below which handing work to a thread costs more than it saves
_POOL = ThreadPoolExecutor(thread_name_prefix="moe-prism-attention")


class WriteOnly:
    """The paged cache for models that write to it themselves, as transformers' do from 5.24 on: what comes back is what was written.

    transformers' own `update` gives all that a batch may attend to, and hides from `attention` what is new.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Write; the keys and values as they came."""
        self._cache.update(key_states=key_states, value_states=value_states, layer_idx=layer_idx, kwargs=kwargs)
        return key_states, value_states

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def handed_over(batch: dict[str, Any]) -> None:
    """Let `attention` find the cache in a batch whose model may take it for itself."""
    if not isinstance(batch["cache"], WriteOnly):
        batch[CACHE], batch["cache"] = batch["cache"], WriteOnly(batch["cache"])


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
class PagedLayout:
    """How the packed batch of one step lies in the cache; shared by all layers."""

    page: int
    stride: int
    rows: Tensor  # [D] rows of the requests that decode
    table: Tensor  # [D, blocks]
    lengths: Tensor  # [D]
    prompts: list[tuple[slice, Tensor | None, Tensor | None]] = field(default_factory=list)  # rows, cache index [C], mask [q, C]
    segments: Sequence[Segment] = ()
    tells: bool = False  # `attention` gives its weights too, [1, heads, q, C] of every segment


def plan(segments: Sequence[Segment], page: int, stride: int) -> PagedLayout:
    """Lay out a step. page: tokens per cache block; stride: distance of two blocks in rows of the layer's cache view."""
    decode = [s for s in segments if s.queries == 1]
    blocks = max((len(s.blocks) for s in decode), default=0)
    return PagedLayout(
        page,
        stride,
        torch.tensor([s.start for s in decode]),
        torch.tensor([[*s.blocks, *[0] * (blocks - len(s.blocks))] for s in decode]),
        torch.tensor([s.total for s in decode]),
        [_prompt(s, page, stride) for s in segments if s.queries > 1],
        segments,
    )


def _prompt(segment: Segment, page: int, stride: int) -> tuple[slice, Tensor | None, Tensor | None]:
    rows = slice(segment.start, segment.start + segment.queries)
    if segment.past == 0:
        return rows, None, None
    return rows, places(segment, page, stride), _seen(segment)


def places(segment: Segment, page: int, stride: int) -> Tensor:
    """[C] of all tokens of a request, where two blocks are `stride` apart."""
    pages = -(-segment.total // page)
    return (torch.tensor(segment.blocks[:pages])[:, None] * stride + torch.arange(page)).flatten()[: segment.total]


def _seen(segment: Segment) -> Tensor:
    """[q, C]: which of them every token sees."""
    return torch.ones(segment.queries, segment.total, dtype=torch.bool).tril(segment.past)


def attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, d]
    key: Tensor,  # [1, key heads, T, d]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, list[Tensor] | None]:
    """Writes the new keys and values, then attends request by request. -> [1, T, heads, d]. Without dropout: nobody trains here.

    Also the weights, if the layout asks for them.
    """
    cache = kwargs[CACHE]
    layout: PagedLayout = cache.moe_prism_layout
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if "cache" in kwargs:  # else the model has written already
        kwargs["cache"].update(key, value, layer, kwargs)
    keys, values = cache.layer_to_allocator[layer]._kv_token_views[layer]
    shared = query.shape[1] != key.shape[1]  # grouped-query attention

    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    own = value.shape[3]
    query, key, value = (to_width(states, keys.shape[2]) for states in (query, key, value))

    q = query[0].transpose(0, 1).contiguous()  # [T, heads, d]
    out = torch.empty_like(q)
    if len(layout.rows):
        paged = PagedCache(keys.numpy(), values.numpy(), layout.page, layout.stride)
        _decode(layout, q, paged, scale, out)
    for span, index, mask in layout.prompts:
        k, v = (key[:, :, span], value[:, :, span]) if index is None else (_read(keys, index), _read(values, index))
        attended = nn.functional.scaled_dot_product_attention(
            query[:, :, span], k, v, attn_mask=mask, scale=scale, is_causal=index is None, enable_gqa=shared
        )
        out[span] = attended[0].transpose(0, 1)
    return out[None, ..., :own], [_weights(layout, s, query * scale, keys) for s in layout.segments] if layout.tells else None


def _weights(layout: PagedLayout, segment: Segment, query: Tensor, keys: Tensor) -> Tensor:
    """[1, heads, q, C] of one request, its query scaled."""
    own = query[:, :, segment.start : segment.start + segment.queries]
    read = _read(keys, places(segment, layout.page, layout.stride))
    read = read.repeat_interleave(own.shape[1] // read.shape[1], 1)
    return (own @ read.mT).masked_fill(~_seen(segment), -torch.inf).softmax(-1)


def _decode(layout: PagedLayout, q: Tensor, cache: PagedCache, scale: float, out: Tensor) -> None:
    """Rows of `out` [T, heads, d] that decode."""
    everyone = len(layout.rows) == len(q)
    query = q if everyone else q[layout.rows]
    result = out if everyone else torch.empty_like(query)
    rows = DecodeRows(query.numpy(), layout.table.numpy(), layout.lengths.numpy(), result.numpy())
    threads = min(torch.get_num_threads(), len(rows.lengths))
    if threads == 1 or rows.lengths.sum() < WORTH_A_THREAD:
        decode_attention(rows, cache, scale)
    else:
        cuts = [len(rows.lengths) * i // threads for i in range(threads + 1)]
        list(_POOL.map(lambda span: decode_attention(rows.part(slice(*span)), cache, scale), pairwise(cuts)))
    if not everyone:
        out[layout.rows] = result


def _read(cache: Tensor, index: Tensor) -> Tensor:
    """cache [rows, key heads, d] at index [C] -> [1, key heads, C, d]. `index_select` copies rows twice as fast as indexing."""
    return cache.index_select(0, index).transpose(0, 1)[None]


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
