"""Start a Qwen2-MoE from the weights of an OLMoE of the same shape, where there is little time to train.

Both have the same tokenizer. What differs is translated: the norms of queries and keys go into the projections, and the sum of the
routing weights, which the new model makes 1, into the experts' output. The shared expert starts as what one expert can give of a layer's
whole output, and the routed experts give that much less. So the new model begins close to the old one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_prism.model import load_model

RIDGE = 0.01  # of the mean square of an activation
SHARE = 0.5  # of what the shared expert could take: with all of it the loss begins .22 higher, with half .04


@torch.no_grad()
def start_from(model: Any, source: str, ids: Tensor) -> None:
    """Give the model the translated weights of `source`; means that the translation needs are taken over windows of tokens [n, length]."""
    old = load_model(source, torch.float32)
    inputs: list[Tensor] = []
    facts = _means(old, ids, inputs)
    model.model.embed_tokens.weight.copy_(old.model.embed_tokens.weight)
    model.lm_head.weight.copy_(old.lm_head.weight)
    model.model.norm.weight.copy_(old.model.norm.weight)
    for i, (new, was, (q, k, mass)) in enumerate(zip(model.model.layers, old.model.layers, facts, strict=True)):
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
        _move_to_shared(new.mlp, inputs[i])


def _activation(x: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def _fit(a: Tensor, y: Tensor) -> Tensor:
    """The map [d, f] that takes activations a [T, f] to outputs y [T, d] with the least squared error."""
    gram = a.T @ a
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram + ridge, a.T @ y).T


def _move_to_shared(mlp: Any, x: Tensor) -> None:
    """Give the shared expert a share of what it can take of the routed experts' output on x [T, d], and take as much from them.

    Its neurons are the same number of every expert's, those that put out the most over all tokens. Its gate starts at a half.
    """
    experts, shared = mlp.experts, mlp.shared_expert
    share = shared.gate_proj.weight.shape[0] // len(experts.gate_up_proj)
    logits = x @ mlp.gate.weight.T
    weight, index = logits.softmax(-1).topk(mlp.gate.top_k)
    weight = weight / weight.sum(-1, keepdim=True)
    y, kept = torch.zeros_like(x), []
    for e, (gate_up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
        a = _activation(x, gate_up)
        best = (a.square().mean(0) * down.square().sum(0)).topk(share).indices
        kept.append(gate_up.unflatten(0, (2, -1))[:, best])
        y += (a @ down.T) * (weight * (index == e)).sum(-1, keepdim=True)
    gate, up = torch.cat(kept, dim=1)
    a = _activation(x, torch.cat([gate, up]))
    down = SHARE * _fit(a, y)
    shared.gate_proj.weight.copy_(gate)
    shared.up_proj.weight.copy_(up)
    shared.down_proj.weight.copy_(2 * down)  # sigmoid(0) is a half
    mlp.shared_expert_gate.weight.zero_()
    given = a @ down.T
    for e, gate_up in enumerate(experts.gate_up_proj):
        rows = (index == e).any(-1)
        experts.down_proj[e] -= _fit(_activation(x[rows], gate_up), given[rows])


def _means(old: Any, ids: Tensor, inputs: list[Tensor]) -> list[tuple[float, float, float]]:
    """Per layer: root mean square of queries and of keys before their norms, and the sum of a token's routing weights.

    Into `inputs` goes what every MoE layer sees [T, d].
    """
    found: dict[tuple[int, str], float] = {}
    hooks = []
    for i, layer in enumerate(old.model.layers):
        for name in ("q_norm", "k_norm"):

            def before(_: nn.Module, args: tuple[Tensor, ...], key: tuple[int, str] = (i, name)) -> None:
                found[key] = float(args[0].square().mean(-1).sqrt().mean())

            hooks.append(getattr(layer.self_attn, name).register_forward_pre_hook(before))
        hooks.append(layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1))))
    out = old(ids, use_cache=False, output_router_logits=True)
    for hook in hooks:
        hook.remove()
    k = old.config.num_experts_per_tok
    mass = [float(logits.softmax(-1).topk(k).values.sum(-1).mean()) for logits in out.router_logits]
    return [(found[i, "q_norm"], found[i, "k_norm"], m) for i, m in enumerate(mass)]
