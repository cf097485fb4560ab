"""Import this to have transformers know the architectures that are ours: `AutoModelForCausalLM` then loads their checkpoints."""

from __future__ import annotations

from . import adamoe, chain_of_experts, dynamic_moe, moe_plus_plus, rexmoe, rmoe

__all__ = ["adamoe", "chain_of_experts", "dynamic_moe", "moe_plus_plus", "rexmoe", "rmoe"]
