"""Room in transformers' paged cache for multi-head latent attention: DeepSeek-V2, V3 and their kin.

The cache takes the width of a head from `config.head_dim`, which in these models is that of the rotated part of a key alone. What it has to
hold are keys and narrower values of all heads; from transformers 5.24 on the model writes the latent that both are made of, and the
rotated part, of one head. So the cache is made as wide as the wider of two, and the other gets zeros behind: they add nothing to a sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from ...cache_names import NEW, cache_argument

PARTS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")


def to_width(states: Tensor, width: int) -> Tensor:
    """states [..., d] with zeros behind, [..., width]; the same tensor where d is width."""
    return states if states.shape[-1] == width else pad(states, (0, width - states.shape[-1]))


def writes_latents(model: Any) -> bool:
    """Whether the model puts latents into a cache, out of which it makes keys and values after reading."""
    return _parts(model) is not None and NEW in cache_argument(model, None)


@contextmanager
def room(model: Any) -> Iterator[None]:
    """A cache that is made in this block has room for the model's attention."""
    config, parts = model.config.get_text_config(), _parts(model)
    if parts is None:
        yield
        return
    unrotated, rotated, value, latent = parts
    wanted = {"head_dim": max(unrotated + rotated, value)}
    if writes_latents(model):
        wanted = {"head_dim": max(latent, rotated), "num_key_value_heads": 1}
    own = {name: getattr(config, name, None) for name in wanted}
    try:
        for name, number in wanted.items():
            setattr(config, name, number)
        yield
    finally:
        for name, before in own.items():
            setattr(config, name, before)  # the model's, which may ask for it again


def fill(cache: Any, model: Any) -> None:
    """Have a cache that was made in `room` take what is narrower, and give it back as it came."""
    if _parts(model) is None:
        return
    update = cache.update
    width = next(iter(cache.cache_allocators.values())).head_dim

    def padded(key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        keys, values = update(
            key_states=to_width(key_states, width), value_states=to_width(value_states, width), layer_idx=layer_idx, kwargs=kwargs
        )
        return keys[..., : key_states.shape[-1]], values[..., : value_states.shape[-1]]

    cache.update = padded


def _parts(model: Any) -> tuple[int, int, int, int] | None:
    """Widths of the unrotated and the rotated part of a key, of a value and of a latent; None for other attention."""
    config = model.config.get_text_config()
    unrotated, rotated, value, latent = (getattr(config, name, None) for name in PARTS)
    if isinstance(unrotated, int) and isinstance(rotated, int) and isinstance(value, int) and isinstance(latent, int):
        return unrotated, rotated, value, latent
    return None
