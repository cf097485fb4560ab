"""Tiny random-weight models of every transformers family whose experts we take.

Families behind the experts interface are found by scanning the installed transformers, never listed by hand; the few others are named in
`moe_prism.model.families`. One generic table of sizes is applied where a
family's config has the attribute; `OVERRIDES` holds what a family needs beyond it, `UNSUPPORTED` why a family cannot pass, `NOT_TAKEN` why
a family outside the interface is refused.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from moe_prism.model.families import WITHOUT_INTERFACE

from .checks import VOCAB

GENERIC: dict[str, Any] = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "dense_intermediate_size": 16,
    # attention: as many key-value heads as heads, which latent attention needs
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 16,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # experts, as the families spell them
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_local_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 4,
        "attn_config": {"kv_n_heads": 4, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [16, 16],  # text experts, vision experts
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "gemma4": {"enable_moe_block": True, "hidden_size_per_layer_input": 8},
    "glm4v_moe": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]}
    },
    # no rotary part in its attention; one indexed attention layer in four
    "glm5_next": {"qk_rope_head_dim": 0, "index_kpool": 4},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_chunk_size": 16},
    "jetmoe": {"kv_channels": 8},
    "llama4": {"num_experts_per_tok": 1, "moe_layers": [0, 2, 3], "intermediate_size_mlp": 16},
    "longcat_flash": {
        "num_layers": 2,
        "qk_head_dim": 16,
        "expert_ffn_hidden_size": 16,
        "ffn_hidden_size": 16,
        "zero_expert_num": 3,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mimo_v2_flash": {
        "num_key_value_heads": 2,  # its sliding layers double them
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "qwen4_exp": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "step3p7": {
        "share_expert_dim": 16,
        "sliding_window": 4,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "swiglu_limits": [None, None, 0.5, 0.5],
    },
    "switch_transformers": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 2,  # some tokens are left without an expert
        "decoder_start_token_id": 0,
    },
    "zaya": {"num_experts_per_tok": 1},  # the one value its config accepts
}
CLASSES: dict[str, str] = {"switch_transformers": "SwitchTransformersForConditionalGeneration"}
UNSUPPORTED: dict[str, str] = {
    "muse_spark": "normalizes the output of each expert, so sub-experts do not add up to it",
}
NOT_TAKEN: dict[str, tuple[str, str]] = {
    # family: (module that is named when it is refused, why)
    "doge": ("DogeCDMoE", "an expert is one neuron, a row of two embeddings: there is nothing to split"),
    "nllb_moe": (
        "NllbMoe",
        "transformers 5.19 calls its experts with a mask in the place of ids, so that only the first two ever run",
    ),
    "vitpose_backbone": ("VitPose", "the data set an image belongs to chooses the expert, no router does"),
}
NEWER = {"muse_spark"}  # families with an entry above that came after transformers 5.19


def names() -> list[str]:
    """Every model folder whose modelling file uses the experts interface, and the families whose form of their own is taken."""
    root = Path(transformers.__file__).parent / "models"
    files = root.glob("*/modeling_*.py")
    found = {p.parent.name for p in files if "@use_experts_implementation" in p.read_text("utf-8")}
    return sorted(found | {name for name in WITHOUT_INTERFACE if (root / name).is_dir()})


def model_class(family: str) -> type[nn.Module]:
    """The text model with its head where there is one: *ForCausalLM, else *TextModel, else *Model."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    if family in CLASSES:
        return getattr(module, CLASSES[family])
    for ending in ("ForCausalLM", "TextModel", "Model"):
        for c in classes:
            if c.__name__.endswith(ending) and not c.__name__.endswith("PreTrainedModel"):
                return c
    raise LookupError(family)


def build(family: str) -> nn.Module:
    """A tiny model whose routing is spread and whose experts matter in the output."""
    cls = model_class(family)
    known = {f.name for f in dataclasses.fields(cls.config_class)} | set(cls.config_class.attribute_map)
    sizes = {k: v for k, v in GENERIC.items() if k in known} | OVERRIDES.get(family, {})
    config = cls.config_class(**sizes)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = cls(config).float().eval()
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Redraw matrices and biases: some families start routers at zero or leave them empty, and std 0.02 would hide the experts.

    Other vectors (norms, decay rates, sinks) keep the family's own start, which is what makes its layers well conditioned.
    """
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            fan_in = p.shape[-1] if p.ndim == 2 else max(p.shape[-2:])
            routes = "router" in name or name.endswith("gate.weight") or "embed" in name
            p.copy_((1.0 if routes else fan_in**-0.5) * torch.randn(p.shape, generator=generator))
        elif name.endswith("bias"):
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):  # hash routing by token id (deepseek_v4): the table is zero until a checkpoint is loaded
            experts = model.config.n_routed_experts
            table.copy_(torch.stack([torch.randperm(experts, generator=generator)[: table.shape[1]] for _ in range(len(table))]))
