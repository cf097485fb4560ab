"""Import this to have transformers know the architectures that are ours: `AutoModelForCausalLM` then loads their checkpoints."""

from __future__ import annotations

from . import (
    adamoe,
    chain_of_experts,
    dit_moe,
    dynamic_moe,
    graph_of_tokens,
    moe_plus_plus,
    mote,
    read_me,
    rexmoe,
    rmoe,
    union_of_experts,
)

__all__ = [
    "adamoe",
    "chain_of_experts",
    "dit_moe",
    "dynamic_moe",
    "graph_of_tokens",
    "moe_plus_plus",
    "mote",
    "read_me",
    "rexmoe",
    "rmoe",
    "union_of_experts",
]
