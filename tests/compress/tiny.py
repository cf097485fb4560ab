"""Random two-layer models, one per kind of router, whose experts matter and whose routing is spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

EXPERTS, PER_TOKEN = 8, 2
BASE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": PER_TOKEN,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "num_hidden_layers": 3,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("olmoe", {"num_experts": EXPERTS}),
    "softmax-normalised": ("qwen3_moe", {"num_experts": EXPERTS, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}),
    "top-k-softmax": ("mixtral", {"num_local_experts": EXPERTS}),
    "router-bias": (
        "gpt_oss",
        {"num_local_experts": EXPERTS, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "sigmoid-bias": (
        "glm4_moe",
        {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_hidden_layers": 3, "n_group": 1,
         "topk_group": 1},
    ),
    "group-softmax": (
        "deepseek_v2",
        {**LATENT, "n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
    ),
    "group-sigmoid": ("deepseek_v3", {**LATENT, "n_routed_experts": 16, "n_group": 4, "topk_group": 2}),
}  # fmt: skip
IDS = torch.randint(3, 64, (4, 24), generator=torch.Generator().manual_seed(5))


def build(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    family, changes = FAMILIES[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**BASE, **changes}), dtype=dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            scale = 1.0 if "gate.weight" in name or "router.weight" in name else 0.2
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + (tensor.ndim == 1 and "norm" in name))
    return model


def save(kind: str, folder: Path, shard: str = "20KB", dtype: torch.dtype = torch.float32) -> Any:
    model = build(kind, dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS, use_cache=False).logits.float()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())
