"""How far back a model looks, as its configuration says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def context_limit(model: Any) -> int | None:
    """Tokens a sequence may have, if the model says."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def full_attention(model: Any) -> bool:
    """Whether every layer sees every token."""
    config = model.config.get_text_config()
    types: Sequence[str] | None = getattr(config, "layer_types", None)
    if types is not None:
        return all(t == "full_attention" for t in types)
    return getattr(config, "sliding_window", None) is None
