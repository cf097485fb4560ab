"""Start a Qwen2-MoE from the weights of an OLMoE of the same shape, where there is little time to train.

Both have the same tokenizer. What differs is translated: the norms of queries and keys go into the projections, and the sum of the
routing weights, which the new model makes 1, into the experts' output. The shared expert starts with no output. So the new model begins
close to the old one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_prism.model import load_model


@torch.no_grad()
def start_from(model: Any, source: str, ids: Tensor) -> None:
    """Give the model the translated weights of `source`; means that the translation needs are taken over windows of tokens [n, length]."""
    old = load_model(source, torch.float32)
    facts = _means(old, ids)
    model.model.embed_tokens.weight.copy_(old.model.embed_tokens.weight)
    model.lm_head.weight.copy_(old.lm_head.weight)
    model.model.norm.weight.copy_(old.model.norm.weight)
    for new, was, (q, k, mass) in zip(model.model.layers, old.model.layers, facts, strict=True):
        a, b = new.self_attn, was.self_attn
        a.q_proj.weight.copy_(b.q_proj.weight * (b.q_norm.weight / q)[:, None])
        a.k_proj.weight.copy_(b.k_proj.weight * (b.k_norm.weight / k)[:, None])
        a.v_proj.weight.copy_(b.v_proj.weight)
        a.o_proj.weight.copy_(b.o_proj.weight)
        for name in ("input_layernorm", "post_attention_layernorm"):
            getattr(new, name).weight.copy_(getattr(was, name).weight)
        new.mlp.gate.weight.copy_(was.mlp.gate.weight)
        new.mlp.experts.gate_up_proj.copy_(was.mlp.experts.gate_up_proj)
        new.mlp.experts.down_proj.copy_(was.mlp.experts.down_proj * mass)
        nn.init.zeros_(new.mlp.shared_expert.down_proj.weight)


def _means(old: Any, ids: Tensor) -> list[tuple[float, float, float]]:
    """Per layer: root mean square of queries and of keys before their norms, and the sum of a token's routing weights."""
    found: dict[tuple[int, str], float] = {}
    hooks = []
    for i, layer in enumerate(old.model.layers):
        for name in ("q_norm", "k_norm"):

            def before(_: nn.Module, args: tuple[Tensor, ...], key: tuple[int, str] = (i, name)) -> None:
                found[key] = float(args[0].square().mean(-1).sqrt().mean())

            hooks.append(getattr(layer.self_attn, name).register_forward_pre_hook(before))
    out = old(ids, use_cache=False, output_router_logits=True)
    for hook in hooks:
        hook.remove()
    k = old.config.num_experts_per_tok
    mass = [float(logits.softmax(-1).topk(k).values.sum(-1).mean()) for logits in out.router_logits]
    return [(found[i, "q_norm"], found[i, "k_norm"], m) for i, m in enumerate(mass)]
