"""Random models on disk that can be calibrated: prism-nano's tokenizer beside weights of a few kilobytes per layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_prism.model.named import NANO

BASE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"],
    },
    "deepseek_v2": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16, "kv_lora_rank": 8,
        "q_lora_rank": None, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "topk_method": "greedy",
    },
    "llama": {},
    "mamba": {"state_size": 4},
}  # fmt: skip


MANIFEST_FACTS: dict[str, Any] = {
    "kind": "pruned",
    "source": {"name": "m", "files": {}},
    "companions": {"licence": {}, "left_out": {}},
    "pruning": {"n_sub": 4},
    "documents": [],
}
"""The least that a manifest says."""


def save_tiny(family: str, folder: Path, *, shard: str = "100KB", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Write a random model of this family with prism-nano's tokenizer; returns the model."""
    nano = json.loads((NANO / "config.json").read_text())
    special = {key: nano[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**BASE, **special, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # matrices that mix well, norms near one: tokens then spread over the experts
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    model.save_pretrained(folder, max_shard_size=shard)
    for file in NANO.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return model


def starve(model: Any, layer: int) -> list[int]:
    """Set a router of six experts, top-2, so that the last two are never chosen; returns them.

    The rows are a, 2a, -a, -2a, 0, 0: whatever the sign of a·x, two of the first four are above zero.
    """
    rows = next(p for name, p in model.named_parameters() if f"layers.{layer}." in name and name.endswith("mlp.gate.weight"))
    with torch.no_grad():
        rows.copy_(torch.tensor([1.0, 2.0, -1.0, -2.0, 0.0, 0.0])[:, None] * rows[0])
    return [4, 5]


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    from moe_prism.checkpoint import sha256_file

    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}
