"""Random two-layer models, saved the way each family stores its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

BASE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16, "kv_lora_rank": 8,
        "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "head_dim": 8, "topk_method": "greedy",
    },
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama": {"tie_word_embeddings": True},
}  # fmt: skip
IDS = torch.arange(3, 27).reshape(2, 12)


def save(family: str, folder: Path, shard: str = "20KB", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Write a model of this family (several shards) and return it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**BASE, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits
