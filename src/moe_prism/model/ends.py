"""Which tokens end an answer."""

from __future__ import annotations

from typing import Any


def end_tokens(model: Any, tokenizer: Any = None) -> frozenset[int]:
    """The end tokens that the generation config, the config and the tokenizer name, together.

    Releases disagree: a chat model's tokenizer often ends a turn with a token that its generation config does not list.
    """
    size = int(model.config.get_text_config().vocab_size)
    sources = (getattr(model, "generation_config", None), model.config, model.config.get_text_config(), tokenizer)
    found = {token for source in sources for token in _ids(getattr(source, "eos_token_id", None))}
    return frozenset(token for token in found if 0 <= token < size)


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
