"""What an MoE layer is, found in any transformers model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import on_use
from .named import resolve

if TYPE_CHECKING:
    from .base import ExpertLayout, MoELayer
    from .ends import end_tokens
    from .extra import ExtraExperts
    from .find import find_layers
    from .load import load_model, load_to_run, load_tokenizer, read_generation_config
    from .scores import RouterScores

__getattr__ = on_use(  # what a name stands for is said without torch
    __name__,
    {
        "base": "ExpertLayout MoELayer",
        "ends": "end_tokens",
        "extra": "ExtraExperts",
        "find": "find_layers",
        "load": "load_model load_to_run load_tokenizer read_generation_config",
        "scores": "RouterScores",
    },
)

__all__ = [
    "ExpertLayout",
    "ExtraExperts",
    "MoELayer",
    "RouterScores",
    "end_tokens",
    "find_layers",
    "load_model",
    "load_to_run",
    "load_tokenizer",
    "read_generation_config",
    "resolve",
]
