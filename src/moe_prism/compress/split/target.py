"""The checkpoint that a split dense model becomes: Qwen2-MoE, whose attention is Llama's, with one shared expert and many routed ones.

Routed experts of Qwen2-MoE are weighted by a softmax over all of them, and the shared one by a sigmoid. A dense layer is a plain sum. So
scores are tiny (`router.SPREAD`): every routing weight is 1/E, whatever the number of experts that run, and W_down is times E. The gate
of the shared expert is zero, its sigmoid one half, and its W_down is doubled.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from ...checkpoint.convert import quiet
from ...errors import UsageError
from ...model import MoELayer, find_layers
from . import UNIT, Deal

OTHER = "give a model whose decoder is Llama's: Llama, Mistral, Qwen2, SmolLM2 and their like"
OWN = ("model_type", "architectures", "torch_dtype", "transformers_version", "quantization_config", "layer_types")
TINY = 4  # heads of the models that the families are compared in


def target_config(dense: Any, *, experts: int, active: int, shared: int, bias: bool) -> Qwen2MoeConfig:
    """The configuration of the result. UsageError for a source that is known to compute something else."""
    values = dense.to_dict()
    window = values.get("sliding_window")
    if window is not None and values.get("use_sliding_window", True):
        raise UsageError(f"the model attends to {window} tokens only, in some layers or all", OTHER)
    known = Qwen2MoeConfig().to_dict()
    common = {name: value for name, value in values.items() if (name in known or name == "head_dim") and name not in OWN}
    width = dense.intermediate_size
    return Qwen2MoeConfig(
        **common
        | {
            "qkv_bias": bias,
            "num_experts": experts,
            "num_experts_per_tok": active,
            "moe_intermediate_size": (width - shared) // experts,
            "shared_expert_intermediate_size": shared or UNIT,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "router_aux_loss_coef": 0.0,
            "architectures": [Qwen2MoeForCausalLM.__name__],
            "dtype": dense.dtype,
        }
    )


def layer_tensors(prefix: str, layer: MoELayer, deal: Deal, router: Tensor) -> dict[str, Tensor]:
    """What the block `prefix` holds, by its names on disk, in the layer's type. router [E, d]."""
    gate, up, down = layer.gate, layer.up, layer.down
    assert gate is not None
    parts = {f"experts.{e}": (own, float(len(deal.experts))) for e, own in enumerate(deal.experts)}
    parts["shared_expert"] = deal.shared, 2.0
    found = {"gate.weight": router.to(up.dtype), "shared_expert_gate.weight": torch.zeros(1, layer.hidden, dtype=up.dtype)}
    for name, (own, factor) in parts.items():
        matrices = (gate[0, own], up[0, own], down[0][:, own] * factor)
        if not len(own):  # an expert without neurons is none that every tool loads: one of zeros
            matrices = (
                gate.new_zeros(UNIT, layer.hidden),
                gate.new_zeros(UNIT, layer.hidden),
                gate.new_zeros(layer.hidden, UNIT),
            )
        for matrix, tensor in zip(("gate", "up", "down"), matrices, strict=True):
            found[f"{name}.{matrix}_proj.weight"] = tensor.contiguous()
    return {f"{prefix}.{name}": tensor for name, tensor in found.items()}


def written_names(prefix: str, experts: int) -> list[str]:
    """Of `layer_tensors`, without the tensors."""
    parts = [*(f"experts.{e}" for e in range(experts)), "shared_expert"]
    matrices = [f"{part}.{matrix}_proj.weight" for part in parts for matrix in ("gate", "up", "down")]
    return [f"{prefix}.{name}" for name in ("gate.weight", "shared_expert_gate.weight", *matrices)]


@torch.no_grad()
def check_family(dense: Any) -> None:
    """UsageError unless a tiny model of the source's family, split, computes what it did: the only thing that is asked of a family."""
    source = _tiny_config(dense)
    torch_state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        with quiet():
            whole = AutoModelForCausalLM.from_config(source, dtype=torch.float32).eval()
            for parameter in whole.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.1)
            layers = find_layers(whole, dense=True)
            bias = has_bias(whole)
            config = target_config(source, experts=2, active=2, shared=4, bias=bias)
            config.dtype = torch.float32
            split = Qwen2MoeForCausalLM(config).eval()
        _fill(split, whole, layers)
        ids = torch.arange(2, 26)[None]
        expected, found = whole(input_ids=ids).logits, split(input_ids=ids).logits
    finally:
        torch.set_rng_state(torch_state)
    if float((found - expected).abs().max()) > 1e-4 * float(expected.abs().max()):
        raise UsageError(f"a split '{dense.model_type}' does not compute what it did", OTHER)


def has_bias(model: nn.Module) -> bool:
    """Whether attention adds something to its queries."""
    return any(name.endswith("q_proj.bias") for name, _ in model.named_parameters())


def check_names(dense: nn.Module, target: nn.Module, blocks: Mapping[str, object]) -> None:
    """UsageError where anything outside the MLP blocks has another name or shape in the result."""
    inside = tuple(f"{name}." for name in blocks)
    here, there = (
        {name: tuple(p.shape) for name, p in model.state_dict().items() if not name.startswith(inside)}
        for model in (dense, target)
    )
    wrong = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
    if wrong:
        raise UsageError(f"tensor '{wrong[0]}' has no place in a split model", OTHER)


def _fill(split: Any, whole: Any, layers: list[MoELayer]) -> None:
    """Put a tiny dense model's weights into its split."""
    blocks = {layer.name: layer for layer in layers}
    check_names(whole, split, blocks)
    state = split.state_dict()
    for name, tensor in whole.state_dict().items():
        if not name.startswith(tuple(f"{block}." for block in blocks)):
            state[name].copy_(tensor)
    for name, layer in blocks.items():
        order = torch.arange(layer.width)
        deal = Deal(order[:4], tuple(order[4:].chunk(2)))
        made = layer_tensors(name, layer, deal, torch.zeros(2, layer.hidden))
        for e in range(2):
            both = [made[f"{name}.experts.{e}.{matrix}_proj.weight"] for matrix in ("gate", "up")]
            state[f"{name}.experts.gate_up_proj"][e].copy_(torch.cat(both))
            state[f"{name}.experts.down_proj"][e].copy_(made[f"{name}.experts.{e}.down_proj.weight"])
        for part in (
            "gate.weight",
            "shared_expert_gate.weight",
            *(f"shared_expert.{m}_proj.weight" for m in ("gate", "up", "down")),
        ):
            state[f"{name}.{part}"].copy_(made[f"{name}.{part}"])


def _tiny_config(dense: Any) -> Any:
    """The same family with two layers and few heads; everything else as it is."""
    config = copy.deepcopy(dense)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    values = {
        "num_hidden_layers": 2,
        "vocab_size": 64,
        "hidden_size": TINY * size,
        "num_attention_heads": TINY,
        "intermediate_size": 20,
    }
    values["num_key_value_heads"] = TINY if (getattr(config, "num_key_value_heads", None) or heads) == heads else TINY // 2
    values |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    for name, value in values.items():
        setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    return config
