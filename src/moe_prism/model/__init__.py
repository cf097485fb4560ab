"""What an MoE layer is, found in any transformers model."""

from .base import ExpertLayout, MoELayer
from .ends import end_tokens
from .extra import ExtraExperts
from .find import find_layers
from .load import load_model, load_to_run, load_tokenizer, read_generation_config, resolve
from .scores import RouterScores

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
