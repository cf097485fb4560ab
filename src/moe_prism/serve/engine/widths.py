"""Keys and values of different widths in a cache with room for one: multi-head latent attention, as in DeepSeek-V2, V3 and their kin.

transformers' paged cache takes the width of a head from `config.head_dim`. In these models that is the rotated part of a key alone, and
values are narrower than keys. So the cache is made as wide as the wider one, and the other gets zeros behind: they add nothing to a sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.functional import pad


def to_width(states: Tensor, width: int) -> Tensor:
    """states [..., d] with zeros behind, [..., width]; the same tensor where d is width."""
    return states if states.shape[-1] == width else pad(states, (0, width - states.shape[-1]))


def widest(config: Any) -> int | None:
    """Numbers of a head that a cache has to hold, if the configuration says more than `head_dim`."""
    parts = [getattr(config, name, None) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
    if any(not isinstance(part, int) for part in parts):
        return None
    unrotated, rotated, value = parts
    return max(unrotated + rotated, value)


@contextmanager
def room(config: Any) -> Iterator[None]:
    """A cache that is made in this block has room for the model's keys and values."""
    width, own = widest(config), getattr(config, "head_dim", None)
    if width is None:
        yield
        return
    config.head_dim = width
    try:
        yield
    finally:
        config.head_dim = own  # the model's, which may ask for it again


def fill(cache: Any, config: Any) -> None:
    """Have a cache that was made in `room` take what is narrower, and give it back as it came."""
    width, update = widest(config), cache.update
    if width is None:
        return

    def padded(key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        keys, values = update(
            key_states=to_width(key_states, width), value_states=to_width(value_states, width), layer_idx=layer_idx, kwargs=kwargs
        )
        return keys[..., : key_states.shape[-1]], values[..., : value_states.shape[-1]]

    cache.update = padded
